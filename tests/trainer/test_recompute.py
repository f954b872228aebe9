"""drt_recompute=bottleneck in a run: where it acts, the same bits, and what it does not go with."""

import pytest
import tiny
import transformers as T
from equal_runs import assert_equal_runs
from transformers import TrainerCallback

from hf_drt.forms import keep_bottlenecks

ROTATION = "factored@0 dense[1/2]@2 dense[2/2]+frozen[1/2]@4 frozen@6"


class Functions(TrainerCallback):
    """By update step: what calls each block that is on."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        blocks = [m for m in model.modules() if isinstance(m, T.modeling_layers.GradientCheckpointingLayer)]
        self.found[state.global_step] = tuple(called_by(block) for block in blocks)


def called_by(block):
    if not block.gradient_checkpointing:
        return "all"
    return "bottleneck" if block._gradient_checkpointing_func.func is keep_bottlenecks else "input"


def run(folder, resume=None, **settings):
    settings = {"max_steps": 8, "warmup_steps": 0, "drt_schedule": ROTATION, "drt_recompute": "bottleneck", **settings}
    trainer = tiny.trainer(folder, **settings)
    trainer.add_callback(functions := Functions())
    trainer.train(resume_from_checkpoint=resume)
    return trainer, functions.found


def test_it_acts_on_blocks_with_factored_layers(tmp_path):
    _, found = run(tmp_path)
    factored, first = ("bottleneck", "bottleneck"), ("all", "bottleneck")
    assert [found[step] for step in range(8)] == [factored] * 2 + [first] * 2 + [("all", "all")] * 4


def test_where_dense_phases_are_checkpointed_all_blocks_are(tmp_path):
    _, found = run(tmp_path, drt_dense_checkpointing=True)
    factored, dense = ("bottleneck", "bottleneck"), ("input", "input")
    assert [found[step] for step in range(8)] == [factored] * 2 + [dense] * 4 + [("all", "all")] * 2


@pytest.mark.parametrize("both", [False, True], ids=["alone", "with dense_checkpointing"])
def test_a_run_has_the_same_bits_as_one_without(tmp_path, both):
    with_it, _ = run(tmp_path / "a", drt_dense_checkpointing=both)
    without, _ = run(tmp_path / "b", drt_recompute="none")
    assert_equal_runs(with_it, without)


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_run_goes_on_as_the_first_did(tmp_path, step):
    whole, found = run(tmp_path, save_strategy="steps", save_steps=1)
    resumed, again = run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
    assert again == {k: functions for k, functions in found.items() if k >= step}
    assert_equal_runs(resumed, whole)


def test_waiting_and_frozen_weights_have_no_gradient_buffers(tmp_path):
    """A frozen base, a frozen W and a W that is not there take no memory for gradients; what is trained has one."""

    class Gradients(TrainerCallback):
        def __init__(self):
            self.wrong = {}

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            parameters = list(model.named_parameters())
            self.wrong[state.global_step] = [n for n, p in parameters if (p.grad is not None) != p.requires_grad]

    schedule = "factored@0 adapter@1 dense[1/2]@2 dense[2/2]+frozen[1/2]@4 frozen@6"
    trainer = tiny.trainer(tmp_path, max_steps=8, warmup_steps=0, drt_schedule=schedule, drt_adapter_init="principal",
                           drt_dense_checkpointing=True)  # fmt: skip
    trainer.add_callback(gradients := Gradients())
    trainer.train()
    assert gradients.wrong == {step: [] for step in range(8)}


def test_with_torch_compile_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"recompute='bottleneck' does not go with torch_compile .* one of the two"):
        run(tmp_path, torch_compile=True)


def test_where_the_launcher_compiles_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    with pytest.raises(ValueError, match=r"does not go with torch_compile \(--dynamo_backend of accelerate launch\): "):
        run(tmp_path)


def test_where_the_whole_run_is_checkpointed_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"recompute has no effect: activation_checkpointing .*, or leave recompute o"):
        run(tmp_path, activation_checkpointing=True)
