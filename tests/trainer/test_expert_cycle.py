"""Fused experts through a whole cycle of the Trainer."""

import pytest
import tiny
import torch
import transformers as T

from hf_drt.forms import form_of, layer_of

EXPERTS = ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj")


def mixtral():
    return tiny.mixtral(attention_dropout=0.1)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("moments", ["reset", "project"])
@pytest.mark.parametrize("stop", [4, 9, 14, 18])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, stop, moments):
    """In every phase of factored, dense, adapter, factored."""
    changes = {"save_strategy": "steps", "save_steps": stop, "drt_moments": moments, "drt_frobenius_decay": True}
    whole = tiny.trainer(tmp_path, mixtral(), weight_decay=0.1, **changes)
    seen = []
    whole.add_callback(_Watch(seen))
    whole.train()
    assert len({type(form) for forms in seen for form in forms}) == 3
    resumed = tiny.trainer(tmp_path, mixtral(), weight_decay=0.1, **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    state, other = whole.model.state_dict(), resumed.model.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)


class _Watch(T.TrainerCallback):
    def __init__(self, seen):
        self.seen = seen

    def on_step_end(self, args, state, control, model, **kwargs):
        self.seen.append([form_of(layer_of(model, name)) for name in EXPERTS])


def test_what_the_trainer_saves_is_a_dense_model(tmp_path):
    trainer = tiny.trainer(tmp_path, mixtral(), max_steps=4)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    plain = T.MixtralForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(isinstance(plain.get_parameter(name), torch.nn.Parameter) for name in EXPERTS)
    expected = tiny.logits(trainer.model, tiny.batch())
    assert torch.allclose(tiny.logits(plain, tiny.batch()), expected, atol=1e-5)
