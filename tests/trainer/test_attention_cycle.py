"""A model of torch's own encoder layers, from the first phase to what is saved and loaded again."""

import pytest
import tiny
import torch
import transformers as T
from safetensors import safe_open
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from hf_drt import DRTTrainer, form_of, split_attention
from hf_drt.forms import Factored, LowRankLinear, SplitAttention

D = 32


class Config(T.PretrainedConfig):
    model_type = "torch_encoder"


class Encoder(T.PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(tiny.VOCAB, D)
        layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, tiny.VOCAB)
        self.post_init()

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.head(self.encoder(self.embed(input_ids)))
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(Config())


def trainer(folder, **changes) -> DRTTrainer:
    arguments = {
        "max_steps": 8, "save_strategy": "steps", "save_steps": 1, "drt_schedule": "factored@0 dense@2 adapter@4",
        "drt_rank_ratio": 0.25, **changes,
    }  # fmt: skip
    return DRTTrainer(
        model=encoder(), args=tiny.arguments(folder, **arguments), train_dataset=tiny.dataset("llama", 32)
    )


def keys(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def own(names) -> set[str]:
    prefix = "encoder.layers.0.self_attn."
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


PACKED = {"in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"}


def test_a_run_resumed_in_any_phase_ends_with_the_same_bits_and_is_delivered_packed(tmp_path):
    whole = trainer(tmp_path)
    whole.train()
    assert own(keys(tmp_path / "checkpoint-3")) == PACKED  # the dense phase
    assert {"q_proj.U", "q_proj.V", "out_proj.U", "in_proj_weight"} < own(keys(tmp_path / "checkpoint-1"))
    state = whole.model.state_dict()
    assert state.keys() == encoder().state_dict().keys()
    for step in (1, 3, 5):
        resumed = trainer(tmp_path)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        found = resumed.model.state_dict()
        assert [name for name in state if not torch.equal(state[name], found[name])] == []


def test_what_is_saved_dense_loads_strictly_in_a_plain_model_and_computes_the_same(tmp_path):
    run = trainer(tmp_path, drt_schedule="factored@0", save_strategy="no")
    run.train(resume_from_checkpoint=None)
    run.save_model(str(tmp_path / "saved"))
    plain, info = Encoder.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(plain.encoder.layers[0].self_attn) is nn.MultiheadAttention
    inputs = tiny.batch("llama")
    with torch.no_grad():
        expected = run.model.eval()(inputs["input_ids"]).logits
        torch.testing.assert_close(plain.eval()(inputs["input_ids"]).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exclude", [None, [r"[qkv]_proj"], ["out_proj", "linear"]])
def test_a_native_checkpoint_loads_as_it_was(tmp_path, exclude):
    run = trainer(tmp_path, drt_schedule="factored@0", save_strategy="no", drt_export="native", drt_exclude=exclude)
    run.train()
    run.save_model(str(tmp_path / "native"))
    loaded = Encoder.from_pretrained(tmp_path / "native")
    attention = loaded.encoder.layers[0].self_attn
    assert isinstance(attention, SplitAttention)
    assert any(isinstance(form_of(layer), Factored) for layer in (*attention.projections(), attention.out_proj))
    state = run.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    inputs = tiny.batch("llama")["input_ids"]
    assert torch.equal(loaded.eval()(inputs).logits, run.model.eval()(inputs).logits)


def test_a_peft_adapter_cannot_hold_a_projection_of_packed_attention(tmp_path):
    with pytest.raises(
        ValueError, match=r"saves a LoRA of PEFT, for which nn\.MultiheadAttention has no such layer as"
    ):
        trainer(tmp_path, drt_schedule="dense@0 adapter@4", drt_export="adapter", save_strategy="no").train()
    run = trainer(
        tmp_path, drt_schedule="dense@0 adapter@4", drt_export="adapter", save_strategy="no", drt_exclude=["attn"]
    )
    run.train()
    assert type(run.model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert isinstance(run.model.encoder.layers[0].linear1, LowRankLinear)


def test_a_model_that_was_split_by_hand_trains_alike(tmp_path):
    results = []
    for split in (False, True):
        run = trainer(tmp_path, save_strategy="no")
        if split:
            assert split_attention(run.model) == ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
        run.train()
        results.append(run.model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
