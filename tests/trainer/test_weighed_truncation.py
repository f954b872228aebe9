"""drt_truncation=activation in a Trainer's run: what a switch keeps, against inputs that are recorded beside it."""

import copy

import pytest
import tiny
import torch
from equal_runs import assert_equal_runs
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_drt import CheckpointError, DRTConfig, DRTTrainer, DynamicRank, effective_weight
from hf_drt.checkpoint import INPUTS_NAME
from hf_drt.forms import layer_of
from hf_drt.linalg import shrunk
from hf_drt.planning import gathering

SCHEDULE = "dense@0 factored:4@4"


class Recorder(DRTTrainer):
    """Keeps the model and the batches of each update step, each batch with the model as it is then."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        twin = copy.deepcopy(self.model)
        for layer in twin.modules():
            layer._forward_pre_hooks.clear()
        self.__dict__.setdefault("kept", []).append((self.state.global_step, twin, inputs))
        return super().training_step(model, inputs, num_items_in_batch)


class Weights(TrainerCallback):
    """Effective weights of all linear layers after each update."""

    def __init__(self):
        self.after = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        layers = {n: m for n, m in model.named_modules() if n.endswith("_proj")}
        self.after[state.global_step] = {name: effective_weight(layer).double() for name, layer in layers.items()}


def run(folder, resume=None, cls=DRTTrainer, model=None, callbacks=(), **settings):
    settings = {"drt_schedule": SCHEDULE, "drt_truncation": "activation", "max_steps": 6, "warmup_steps": 0, **settings}
    trainer = tiny.trainer(folder, model, cls=cls, **settings)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def moments(kept, name, width) -> torch.Tensor:
    """``sum x x^T`` in float64, by hooks of the test on the models of then; dropout draws anew, and is off."""
    total = torch.zeros(width, width, dtype=torch.float64)
    for model, inputs in kept:
        seen = []
        hook = model.get_submodule(name).register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        X = seen[0].reshape(-1, width).double()
        total += X.mT @ X
    return total


@pytest.mark.parametrize("updates", [10, 2], ids=["the whole phase", "its last two updates"])
def test_a_switch_keeps_the_most_of_the_outputs(tmp_path, monkeypatch, updates):
    """``U U^T W`` of the leading eigenvectors U of ``W C W^T``, in float64."""
    monkeypatch.setattr(gathering, "UPDATES", updates)
    weights, settings = Weights(), {"gradient_accumulation_steps": 2, "max_steps": 5}
    trainer = run(tmp_path, cls=Recorder, model=tiny.llama(), callbacks=[weights], **settings)
    window = [(model, inputs) for step, model, inputs in trainer.kept if 4 - updates <= step < 4]
    assert len(window) == 2 * min(updates, 4)
    switched = next(model for step, model, _ in trainer.kept if step == 4)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        W, P = weights.after[4][name], effective_weight(switched.get_submodule(name)).double()
        C = shrunk(moments(window, name, W.shape[1]))
        U = torch.linalg.eigh(W @ C @ W.mT).eigenvectors[:, -4:]
        torch.testing.assert_close(P, U @ U.mT @ W, rtol=1e-3, atol=1e-5)
        plain = torch.linalg.svd(W).U[:, :4]
        assert (P - plain @ plain.mT @ W).abs().max() > 1e-3
    row = next(row for row in trainer.state.log_history if row.get("drt_phase") == 1)
    assert 0 < row["drt_truncation_error"] < 1
    assert not any(layer._forward_pre_hooks for layer in trainer.model.modules())


def test_evaluations_and_repeated_forward_passes_leave_a_run_as_it_is(tmp_path):
    """Without dropout, whose noise an evaluation's loader shifts in any Trainer."""
    plain = run(tmp_path / "plain", model=tiny.llama())
    evaluated = run(tmp_path / "evaluated", model=tiny.llama(), eval_strategy="steps", eval_steps=1)
    assert_equal_runs(evaluated, plain)
    checkpointed = run(tmp_path / "checkpointed", model=tiny.llama(), activation_checkpointing=True)
    assert_equal_runs(checkpointed, plain)


def test_a_compiled_run_sees_the_inputs_too(tmp_path):
    """Else its layers would have no input, and be truncated by their weights."""
    errors = []
    for name, settings in {"compiled": {"torch_compile": True, "torch_compile_backend": "eager"}, "plain": {}}.items():
        trainer = run(tmp_path / name, model=tiny.llama(), **settings)
        errors.append(next(row for row in trainer.state.log_history if row.get("drt_phase") == 1))
    assert errors[0]["drt_truncation_error"] == pytest.approx(errors[1]["drt_truncation_error"], rel=1e-4)
    by_weight = run(tmp_path / "weight", model=tiny.llama(), drt_truncation="weight")
    other = next(row for row in by_weight.state.log_history if row.get("drt_phase") == 1)
    assert other["drt_truncation_error"] != pytest.approx(errors[1]["drt_truncation_error"], rel=1e-2)
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_resumed_in_the_window_has_the_same_bits(tmp_path, step):
    whole = run(tmp_path, save_strategy="steps", save_steps=1)
    folder = tmp_path / f"checkpoint-{step}"
    counts = {name: int(value) for name, value in load_file(folder / INPUTS_NAME).items() if name.startswith("count.")}
    assert set(counts.values()) == {step * 2 * 4 * tiny.LENGTH}  # accumulation of 2, 4 rows each
    assert not (tmp_path / "checkpoint-5" / INPUTS_NAME).exists()
    assert_equal_runs(run(tmp_path, resume=str(folder)), whole)


def test_a_checkpoint_without_its_inputs_is_incomplete(tmp_path):
    run(tmp_path, save_strategy="steps", save_steps=3, max_steps=5)
    path = tmp_path / "checkpoint-3" / INPUTS_NAME
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"drt_inputs\.safetensors is cut short or damaged"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"), max_steps=5)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"drt_inputs\.safetensors is missing: the checkpoint is incomplete"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"), max_steps=5)


def test_a_run_that_stops_in_the_window_leaves_no_hook(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = run(tmp_path, callbacks=[Stop()])
    assert trainer.state.global_step == 2
    assert not any(layer._forward_pre_hooks for layer in trainer.model.modules())
    assert trainer.drt.inputs.names == []


def test_fused_experts_are_truncated_by_their_weights_and_other_layers_by_inputs(tmp_path):
    settings = {"max_steps": 4, "drt_schedule": "dense@0 factored:4@3", "learning_rate": 0.0}
    weighed = run(tmp_path / "a", model=tiny.mixtral(), **settings)
    plain = run(tmp_path / "b", model=tiny.mixtral(), **settings, drt_truncation="weight")
    differs = {
        name: not torch.equal(
            effective_weight(layer_of(weighed.model, name)), effective_weight(layer_of(plain.model, name))
        )
        for name in weighed.drt.targets
    }
    assert {name for name in differs if "experts" in name} == {name for name, other in differs.items() if not other}
    assert any("experts" in name for name in differs)


def test_what_was_gathered_goes_with_a_model_that_is_put_back():
    """As where memory runs out, and the run begins again with smaller batches."""
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule=SCHEDULE, truncation="activation"), max_steps=8)
    drt.apply(0)
    back, optimizer = drt.remembered(), torch.optim.SGD(model.parameters())
    drt.begin_step(0, optimizer)
    model(**tiny.batch()).loss.backward()
    assert drt.inputs.state_dict()
    back()
    assert drt.inputs.state_dict() == {}
    assert not any(layer._forward_pre_hooks for layer in model.modules())
