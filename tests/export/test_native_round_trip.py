"""What save_pretrained writes of a model in any mix of forms, every from_pretrained of transformers loads as it was."""

import json
import re

import forked
import mixed as kit
import pytest
import tiny
import torch
import transformers as T
from mixed import batch, difference, files, forms, mixed
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import initialization
from transformers.integrations.flash_attention import get_target_dtype
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hf_drt import Adapter, Dense, DRTConfig, DynamicRank, Factored, convert, form_of
from hf_drt.forms import LowRankLinear
from hf_drt.planning.origin import is_pretrained


@pytest.fixture
def no_report(caplog):
    """transformers only warns of weights that are missing or unexpected: here there are none."""
    logger = T.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.get_records("call") if "LOAD REPORT" in record.getMessage()]


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("kind", kit.MODELS)
def test_a_model_in_mixed_forms_loads_as_it_was_and_saves_to_the_same_bytes(tmp_path, kind):
    model = mixed(kind)
    assert {type(form) for form in forms(model).values()} == {Dense, Factored, Adapter}
    model.save_pretrained(tmp_path / "a")
    loaded = tiny.AUTO[kind].from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert type(loaded) is type(model)
    assert forms(loaded) == forms(model)
    assert files(tmp_path / "b") == files(tmp_path / "a")
    assert difference(loaded, model, kind) == 0
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("kind", kit.MODELS)
def test_what_trains_is_what_trained_before(tmp_path, kind):
    model = mixed(kind)
    model.save_pretrained(tmp_path)
    loaded = tiny.AUTO[kind].from_pretrained(tmp_path)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == trainable
    assert not all(trainable.values())
    assert is_pretrained(loaded)


def test_config_json_holds_shape_and_form_of_every_low_rank_layer(tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (block["quant_method"], block["format_version"]) == ("hf_drt", 1)
    expected = {
        "model.layers.0.self_attn.k_proj": {"shape": [32, 32], "form": "factored", "rank": 4},
        "model.layers.0.mlp.down_proj": {"shape": [32, 64], "form": "adapter", "rank": 4, "alpha": 8.0, "init": "zero"},
    }
    assert block["layers"] | expected == block["layers"]
    assert block["layers"].keys() == {name for name, form in forms(model).items() if form != Dense()}


def test_no_mark_of_a_quantizer_is_left_on_the_model(tmp_path):
    mixed().save_pretrained(tmp_path)
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        assert not hasattr(model, mark)
    assert model._keys_to_ignore_on_load_unexpected == tiny.llama()._keys_to_ignore_on_load_unexpected
    layer = model.model.layers[0].self_attn.k_proj
    with pytest.raises(RuntimeError, match="would write to the weight of a low-rank layer"):
        initialization.zeros_(layer.weight)  # which passes over what from_pretrained is loading
    assert model.half().dtype == torch.float16  # which transformers refuses for quantized models


def test_loaded_layers_are_not_initialised(tmp_path, monkeypatch):
    visited = set()
    monkeypatch.setattr(T.LlamaPreTrainedModel, "_init_weights", lambda self, module: visited.add(type(module)))
    mixed().save_pretrained(tmp_path)
    visited.clear()
    T.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.nn.Linear in visited
    assert not any(issubclass(cls, LowRankLinear) for cls in visited)


def test_attention_finds_its_dtype_without_any_linear_layer(tmp_path):
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="factored@0", rank=4), max_steps=1)
    drt.apply(0)
    drt.model.save_pretrained(tmp_path)
    for model in (drt.model, T.AutoModelForCausalLM.from_pretrained(tmp_path)):
        model.config.dtype = torch.bfloat16
        attention = model.model.layers[0].self_attn
        assert not any(isinstance(m, torch.nn.Linear) for m in attention.modules())
        assert get_target_dtype(torch.zeros(1), attention) == torch.bfloat16
    drt.to_dense()
    assert get_target_dtype(torch.zeros(1), drt.model.model.layers[0].self_attn) == torch.float32


# ---- other classes


@torch.no_grad()
def hidden(model: torch.nn.Module, kind: str) -> torch.Tensor:
    """What the last block gives to the head."""
    if kind == "t5":
        return model.eval()(**batch(kind), output_hidden_states=True).decoder_hidden_states[-1]
    return model.eval().base_model(**batch(kind))[0]


@pytest.mark.parametrize("kind", kit.MODELS)
def test_the_base_model_takes_a_head_models_checkpoint_and_back(tmp_path, kind):
    model = mixed(kind)
    model.save_pretrained(tmp_path / "a")
    base, info = T.AutoModel.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert type(base) is not type(model)
    assert not [key for key in info["unexpected_keys"] if key.rpartition(".")[0] in forms(model)]
    assert torch.equal(hidden(base, kind), hidden(model, kind))
    base.save_pretrained(tmp_path / "b")
    again = tiny.AUTO[kind].from_pretrained(tmp_path / "b")
    assert torch.equal(hidden(again, kind), hidden(model, kind))
    assert forms(again) == forms(model)


def test_another_head(tmp_path):
    model = mixed("bert")
    model.save_pretrained(tmp_path)
    other = T.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(hidden(other, "bert"), hidden(model, "bert"))
    assert tiny.logits(other, batch("bert")).shape == (4, 3)


def test_low_rank_layers_of_a_head_are_dropped_with_the_head(tmp_path):
    model = tiny.bert()
    head = model.cls.predictions.transform
    head.dense = convert(head.dense, Factored(4)).module
    mixed(model=model).save_pretrained(tmp_path)
    same, base = T.AutoModelForMaskedLM.from_pretrained(tmp_path), T.AutoModel.from_pretrained(tmp_path)
    other = T.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert form_of(same.cls.predictions.transform.dense) == Factored(4)
    assert difference(same, model, "bert") == 0
    for encoder in (base, other):
        assert torch.equal(hidden(encoder, "bert"), hidden(model, "bert"))


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_the_part_without_a_head_can_be_saved_on_its_own(tmp_path, kind):
    model = mixed(kind)
    model.base_model.save_pretrained(tmp_path)
    assert torch.equal(hidden(T.AutoModel.from_pretrained(tmp_path), kind), hidden(model, kind))


@pytest.mark.usefixtures("no_report")
def test_an_encoder_alone_leaves_out_the_decoders_layers(tmp_path):
    model = mixed("t5").eval()
    model.save_pretrained(tmp_path)
    encoder = T.T5EncoderModel.from_pretrained(tmp_path)
    ids = batch("t5")["input_ids"]
    with torch.no_grad():
        assert torch.equal(encoder(ids)[0], model.encoder(ids)[0])


@pytest.mark.usefixtures("no_report")
def test_a_model_of_text_and_images(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = T.LlamaConfig(vocab_size=tiny.VOCAB, **sizes)
    vision = T.CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    config = T.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    model = mixed(model=T.LlavaForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "a")
    loaded = T.AutoModelForImageTextToText.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")  # transformers adds a dtype to the inner configurations
    weights = [files(tmp_path / folder)["model.safetensors"] for folder in "ab"]
    assert weights[0] == weights[1]
    assert loaded.config.quantization_config == model.config.quantization_config
    assert {name.split(".")[1] for name, form in forms(loaded).items() if form != Dense()} == {
        "vision_tower",
        "language_model",
    }
    assert difference(loaded, model) == 0


# ---- ways of loading


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_shards(tmp_path, kind):
    model = mixed(kind)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert difference(tiny.AUTO[kind].from_pretrained(tmp_path), model, kind) == 0


def test_subfolder_and_variant(tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path / "inner", variant="x")
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="inner", variant="x")
    assert difference(loaded, model) == 0


def test_a_revision_of_a_repository_in_the_cache(tmp_path):
    repository = tmp_path / "models--someone--something"
    models = {"1" * 40: mixed(), "2" * 40: mixed(model=tiny.llama(hidden_size=16))}
    (repository / "refs").mkdir(parents=True)
    for branch, (commit, model) in zip(("main", "v2"), models.items(), strict=True):
        (repository / "refs" / branch).write_text(commit)
        model.save_pretrained(repository / "snapshots" / commit)
    for branch, model in zip(("main", "v2"), models.values(), strict=True):
        loaded = T.AutoModelForCausalLM.from_pretrained("someone/something", revision=branch, cache_dir=tmp_path)
        assert difference(loaded, model) == 0


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(tmp_path, device_map):
    model = mixed()
    model.save_pretrained(tmp_path)
    assert difference(T.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map), model) == 0


@pytest.mark.usefixtures("no_report")
def test_layers_on_the_disk(tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = T.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, "model.layers.0": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert loaded.model.layers[0].self_attn.k_proj.U.is_meta
    assert difference(loaded, model) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_dtype(tmp_path, kind):
    model = mixed(kind)
    model.save_pretrained(tmp_path / "a")
    loaded = tiny.AUTO[kind].from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert difference(loaded, model, kind) == 0
    loaded.save_pretrained(tmp_path / "b")
    again = tiny.AUTO[kind].from_pretrained(tmp_path / "b", dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert difference(again, loaded, kind) == 0


def test_layers_that_an_architecture_keeps_in_float32(tmp_path):
    mixed("t5").save_pretrained(tmp_path)
    loaded = T.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    kept = {name: p.dtype for name, p in loaded.named_parameters() if p.dtype == torch.float32}
    assert kept.keys() == {name for name, _ in loaded.named_parameters() if ".wo." in name}
    assert any(name.endswith(("wo.U", "wo.lora_A")) for name in kept)
    assert tiny.logits(loaded, batch("t5")).isfinite().all()


@pytest.mark.usefixtures("no_report")
def test_tied_embeddings_stay_tied(tmp_path):
    model = mixed(model=tiny.llama(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert difference(loaded, model) == 0


def test_a_state_dict_in_place_of_a_folder():
    model = mixed()
    loaded = T.LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert difference(loaded, model) == 0


def test_pipeline(tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(tmp_path)
    text = T.pipeline("text-generation", model=str(tmp_path))(
        "w5 w6 w7", max_new_tokens=4, do_sample=False, return_full_text=False
    )
    ids = model.eval().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert text[0]["generated_text"].split() == [f"w{i}" for i in ids[0, 3:]]


# ---- the layout of the files


def keys(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return set(weights.keys())


@pytest.mark.parametrize("kind", ["vit", "mixtral"])
def test_weights_are_stored_under_the_names_they_have_at_run_time(tmp_path, kind):
    model = mixed(kind)
    model.save_pretrained(tmp_path / "native")
    assert keys(tmp_path / "native") == set(model.state_dict())
    kit.MODELS[kind]().save_pretrained(tmp_path / "dense")
    assert keys(tmp_path / "dense") - set(model.state_dict())  # which is not so without low-rank layers


def test_names_are_taken_as_they_are(tmp_path):
    model = mixed()
    model.save_pretrained(tmp_path)
    loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path, key_mapping={r"layers\.0\.": "layers.1."})
    assert difference(loaded, model) == 0


# ---- without hf_drt


@pytest.mark.parametrize("kind", kit.MODELS)
@pytest.mark.parametrize("head", [True, False])
def test_transformers_that_does_not_know_the_format_raises(tmp_path, kind, head, monkeypatch):
    mixed(kind).save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "hf_drt")
    with pytest.raises(RuntimeError, match="You set `ignore_mismatched_sizes` to `False`"):
        (tiny.AUTO[kind] if head else T.AutoModel).from_pretrained(tmp_path)


def test_what_a_user_without_hf_drt_sees(tmp_path):
    mixed().save_pretrained(tmp_path)
    script = (
        "import sys; sys.modules['hf_drt'] = None\n"
        f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    )
    done = forked.python("-c", script, timeout=120)
    assert done.returncode == 1
    assert "Unknown quantization type, got hf_drt" in done.stderr
    assert re.search(r"k_proj\.weight *\| MISMATCH", done.stderr)
    assert done.stderr.rstrip().splitlines()[-1].startswith("RuntimeError: You set `ignore_mismatched_sizes`")
