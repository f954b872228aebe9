"""drt_dense_checkpointing: blocks are checkpointed in phases with a trained dense layer, and nothing else changes."""

import pytest
import tiny
import torch
import transformers as T
from equal_runs import assert_equal_runs
from transformers import TrainerCallback

from hf_drt import DRTCallback, DRTConfig, DRTTrainer

ROTATION = "factored@0 dense[1/2]@2 dense[2/2]+frozen[1/2]@4 frozen@6"
STEPS = {"max_steps": 8, "warmup_steps": 0, "logging_steps": 8}


class Flags(TrainerCallback):
    """By update step: how many blocks are checkpointed, in training and as seen by an evaluation."""

    def __init__(self):
        self.flags, self.kept = {}, {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.flags[state.global_step] = checkpointed(model)


def checkpointed(model):
    blocks = [m for m in model.modules() if isinstance(m, T.modeling_layers.GradientCheckpointingLayer)]
    return [block.gradient_checkpointing for block in blocks]


def attributes(model):
    names = ("gradient_checkpointing", "_gradient_checkpointing_func", "_require_grads_hooks")
    own = [{key: value for key, value in vars(m).items() if key in names} for m in model.modules()]
    return own, len(model.get_input_embeddings()._forward_hooks), model.config.to_dict()


def run(folder, model=None, resume=None, callback=None, **settings):
    settings = {"drt_schedule": ROTATION, "drt_dense_checkpointing": True, **STEPS, **settings}
    trainer = tiny.trainer(folder, model, **settings)
    trainer.add_callback(flags := Flags())
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, flags.flags


def test_only_phases_with_a_trained_dense_layer_are_checkpointed(tmp_path):
    _, flags = run(tmp_path)
    assert {step: all(found) for step, found in flags.items()} == {step: 2 <= step < 6 for step in range(8)}
    assert not any(any(found) for step, found in flags.items() if not 2 <= step < 6)


def test_a_layer_that_a_setting_keeps_dense_makes_no_dense_phase(tmp_path):
    _, flags = run(tmp_path, drt_schedule="factored@0 dense@4", drt_dense_query_key=True)
    assert {step: all(found) for step, found in flags.items()} == {step: step >= 4 for step in range(8)}


@pytest.mark.parametrize("schedule", [ROTATION, "factored@0 dense@3 adapter@6"])
def test_a_run_has_the_same_bits_as_one_without(tmp_path, schedule):
    with_it, _ = run(tmp_path / "a", drt_schedule=schedule)
    without, _ = run(tmp_path / "b", drt_schedule=schedule, drt_dense_checkpointing=False)
    assert_equal_runs(with_it, without)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5", "vit"])
def test_gradients_of_other_models_have_the_same_bits(tmp_path, kind):
    runs = []
    for on in (True, False):
        args = tiny.arguments(tmp_path, drt_schedule="factored@0 dense@2", drt_dense_checkpointing=on, **STEPS)
        model = tiny.MODELS[kind]()
        for part in model.modules():
            if hasattr(part, "config"):  # with a cache, which checkpointing leaves out, T5 adds up in another order
                part.config.use_cache = False
        trainer = DRTTrainer(model, args, train_dataset=tiny.dataset(kind))
        trainer.train()
        runs.append(trainer)
    assert_equal_runs(*runs)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_a_run_resumed_in_any_phase_is_checkpointed_as_the_first_was(tmp_path, step):
    whole, flags = run(tmp_path, save_strategy="steps", save_steps=1)
    resumed, again = run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"))
    assert again == {k: found for k, found in flags.items() if k >= step}
    assert_equal_runs(resumed, whole)


def test_a_checkpoint_is_resumed_with_or_without_it(tmp_path):
    whole, _ = run(tmp_path, save_strategy="steps", save_steps=3)
    resumed, flags = run(tmp_path, resume=str(tmp_path / "checkpoint-3"), drt_dense_checkpointing=False)
    assert not any(map(any, flags.values()))
    assert_equal_runs(resumed, whole)


def test_evaluation_is_not_checkpointed(tmp_path, monkeypatch):
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr("hf_drt.activations.blocks.checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    trainer, _ = run(tmp_path)
    blocks, steps, accumulation = 2, 4, 2
    assert len(calls) == blocks * steps * accumulation
    trainer.evaluate()
    assert len(calls) == blocks * steps * accumulation


def test_the_model_is_afterwards_as_it_was(tmp_path):
    model = tiny.llama(attention_dropout=0.1)
    plain = tiny.trainer(tmp_path, tiny.llama(attention_dropout=0.1), drt_schedule=ROTATION, **STEPS)
    plain.train()  # Trainer itself writes to the configuration
    before = attributes(plain.model)
    run(tmp_path, model, drt_schedule="factored@0 dense@2")
    assert attributes(model) == before


def test_the_model_is_as_it_was_where_training_fails(tmp_path):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise RuntimeError("no more")

    model = tiny.llama()
    with pytest.raises(RuntimeError, match="no more"):
        run(tmp_path, model, callback=Fails())
    assert not any(checkpointed(model))
    run(tmp_path, tiny.llama())


def test_a_second_run_of_the_same_trainer_begins_anew(tmp_path):
    trainer = tiny.trainer(tmp_path, drt_schedule=ROTATION, drt_dense_checkpointing=True, **STEPS)
    trainer.add_callback(flags := Flags())
    trainer.train()
    first = flags.flags.copy()
    trainer.train()
    assert flags.flags == first


def test_every_nth_block_where_the_arguments_say_so(tmp_path):
    _, flags = run(tmp_path, gradient_checkpointing_kwargs={"every_n_layers": 2, "preserve_rng_state": True})
    assert flags[0] == [False, False]
    assert flags[2] == [True, False]


@pytest.mark.filterwarnings("ignore:.*pin")
def test_inputs_are_held_where_the_arguments_say_so(tmp_path, monkeypatch):
    entered = []
    kind = torch.autograd.graph.save_on_cpu

    class Seen(kind):
        def __init__(self, pin_memory=False, device_type="cuda"):
            entered.append(device_type)
            super().__init__(pin_memory=False, device_type=device_type)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Seen)
    with_it, _ = run(tmp_path / "a", gradient_checkpointing_kwargs={"offload": True})
    assert entered == ["cpu"] * (2 * 4 * 2)
    without, _ = run(tmp_path / "b", drt_dense_checkpointing=False)
    assert_equal_runs(with_it, without)


def test_in_a_plain_trainer_too(tmp_path):
    args = T.TrainingArguments(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True
    )
    config = DRTConfig(schedule=ROTATION, dense_checkpointing=True)
    model, flags = tiny.llama(), Flags()
    callbacks = [DRTCallback(config), flags]
    T.Trainer(model, args, train_dataset=tiny.dataset(), callbacks=callbacks).train()
    assert {step: all(found) for step, found in flags.flags.items()} == {step: 2 <= step < 6 for step in range(8)}
    assert not any(checkpointed(model))


def test_compiled(tmp_path):
    """Turned on and off between compiled phases; the numbers are those of a run that is not compiled."""
    runs = []
    for settings in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        schedule = "factored@0 dense@2 factored@4"
        trainer, flags = run(
            tmp_path, tiny.llama(), drt_schedule=schedule, max_steps=6, logging_steps=1, drt_moments="project",
            lr_scheduler_type="constant", learning_rate=1e-3, **settings,
        )  # fmt: skip
        runs.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        assert {step: all(found) for step, found in flags.items()} == {step: 2 <= step < 4 for step in range(6)}
    assert runs[0] == pytest.approx(runs[1], rel=1e-4)


# ---- refused


def refused(folder, message, model=None, **settings):
    settings = {"drt_schedule": ROTATION, "drt_dense_checkpointing": True, **settings}
    with pytest.raises(ValueError, match=message):
        tiny.trainer(folder, model, **settings)


def test_where_the_whole_run_is_checkpointed_it_is_refused(tmp_path):
    message = r"no effect: activation_checkpointing .* in every phase\. Turn that off, or leave dense_checkpointing out"
    refused(tmp_path, message, gradient_checkpointing=True)


def test_where_the_model_is_checkpointed_already_it_is_refused(tmp_path):
    model = tiny.llama()
    model.activation_checkpointing_enable()
    refused(tmp_path, r"blocks are checkpointed in every phase already\. Turn .* off, or leave", model)


def test_reentrance_is_refused(tmp_path):
    message = r"use_reentrant=True, which needs other inputs.* Leave use_reentrant out, or set it to False"
    refused(tmp_path, message, gradient_checkpointing_kwargs={"use_reentrant": True})


def test_a_model_without_support_is_refused(tmp_path):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            blocks = (torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)) for _ in range(2))
            self.blocks = torch.nn.ModuleList(blocks)

    refused(tmp_path, r"but Plain does not support activation checkpointing\. Leave it out, and see", Plain())


def test_a_model_that_says_it_has_no_support_is_refused(tmp_path):
    model = tiny.llama()
    model.supports_gradient_checkpointing = False
    refused(tmp_path, r"but LlamaForCausalLM does not support activation checkpointing", model)


def test_dividing_batches_is_refused_in_a_plain_trainer(tmp_path):
    args = T.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    callback = DRTCallback(DRTConfig(schedule=ROTATION, dense_accumulation=2))
    with pytest.raises(ValueError, match=r"dense_accumulation divides the batches .* Use DRTTrainer, or gradient_acc"):
        T.Trainer(tiny.llama(), args, train_dataset=tiny.dataset(), callbacks=[callback])
