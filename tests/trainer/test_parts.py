"""Composite models: one line of configuration decides for each part, through a whole run with save and load."""

import re

import pytest
import torch
import transformers as T
from datasets import Dataset
from tiny import LENGTH, VOCAB, arguments, t5

from hf_drt import DRTTrainer
from hf_drt.forms import Factored, form_of

TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**TEXT, "image_size": 8, "patch_size": 4}


def llava():
    config = T.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION},
        text_config={"model_type": "llama", "vocab_size": VOCAB, "num_key_value_heads": 2, **TEXT},
        image_token_index=VOCAB - 1, vision_feature_layer=-1,
    )  # fmt: skip
    return T.LlavaForConditionalGeneration(config)


def clip():
    vision, text = T.CLIPVisionConfig(**VISION), T.CLIPTextConfig(vocab_size=VOCAB, eos_token_id=2, **TEXT)
    return T.CLIPModel(T.CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=32))


def vision_encoder_decoder():
    decoder = T.BertConfig(vocab_size=VOCAB, is_decoder=True, add_cross_attention=True, **TEXT)
    config = T.VisionEncoderDecoderConfig.from_encoder_decoder_configs(T.ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return T.VisionEncoderDecoderModel(config)


def rows(kind):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB - 1, (16, LENGTH), generator=generator)
    columns = {}
    if kind != "vision-encoder-decoder":
        columns["input_ids"] = ids
    if kind == "llava":
        columns["input_ids"] = torch.cat([torch.full((16, 4), VOCAB - 1), ids], dim=1)
    if kind != "clip":
        columns["labels"] = columns.get("input_ids", ids)
    if kind != "t5":
        columns["pixel_values"] = torch.randn(16, 3, 8, 8, generator=generator)
    if kind == "clip":
        columns["return_loss"] = torch.ones(16, dtype=torch.bool)
    return Dataset.from_dict({name: value.tolist() for name, value in columns.items()}).with_format("torch")


class PairTrainer(DRTTrainer):
    """CLIP's forward pass gives its loss if it is asked to."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**{**inputs, "return_loss": True})
        return (outputs.loss, outputs) if return_outputs else outputs.loss


MODELS = {"llava": llava, "clip": clip, "vision-encoder-decoder": vision_encoder_decoder, "t5": t5}
# Settings, then the rank of every layer under a part; None: it stays dense. All widths are 32 or more.
PLANS = {
    "only the text part": ("llava", {"drt_include": ["language_model"]}, {"language_model": 8, "vision_tower": None}),
    "a rank per part": (
        "llava",
        {"drt_rank_pattern": {"vision_tower": 0.125, "language_model": 0.25}},
        {"vision_tower": 4, "language_model": 8},
    ),
    "clip, towers apart": ("clip", {"drt_rank_pattern": {"vision_model": 0.125}}, {"vision_model": 4, "text_model": 8}),
    "vision encoder dense": (
        "vision-encoder-decoder", {"drt_exclude": ["^encoder"]}, {r"^encoder\.": None, r"^decoder\.": 8},
    ),
    "encoder dense": ("t5", {"drt_exclude": ["^encoder"]}, {r"^encoder\.": None, r"^decoder\.": 8}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANS)
def test_each_part_follows_its_plan_through_a_run_that_is_saved_and_loaded(name, tmp_path):
    kind, settings, expected = PLANS[name]
    torch.manual_seed(0)
    model = MODELS[kind]()
    settings = {
        "max_steps": 4, "gradient_accumulation_steps": 1, "warmup_steps": 0, "drt_export": "native",
        "drt_schedule": "factored@0 dense@1 adapter@2 factored@3", "remove_unused_columns": False, **settings,
    }  # fmt: skip
    trainer = (PairTrainer if kind == "clip" else DRTTrainer)(
        model=model, args=arguments(tmp_path, **settings), train_dataset=rows(kind)
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    loaded = type(model).from_pretrained(tmp_path / "model")
    for part, rank in expected.items():
        layers = {
            n: m for n, m in loaded.named_modules() if re.search(part, n) and (hasattr(m, "form") or _is_dense(m))
        }
        ranks = {form_of(m).rank for m in layers.values() if isinstance(form_of(m), Factored)}
        assert layers, f"no layer under {part}"
        assert ranks == (set() if rank is None else {rank}), part
    batch = dict(rows(kind)[:2])
    batch.pop("return_loss", None)
    with torch.no_grad():
        before, after = model.eval()(**batch), loaded.eval()(**batch)
    key = "logits_per_image" if kind == "clip" else "logits"
    torch.testing.assert_close(before[key], after[key])


def _is_dense(module):
    return isinstance(module, torch.nn.Linear)


def test_a_whole_cycle_loses_no_layer_of_any_part():
    from hf_drt import find_targets

    parts = {name.partition("layer")[0] for name in find_targets(llava()).targets}
    assert parts == {"model.vision_tower.encoder.", "model.language_model."}
