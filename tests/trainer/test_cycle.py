"""Whole cycles over real architectures, saving, freeing and reporting."""

import gc
import math
import time
import weakref

import pytest
import tiny
import torch
import transformers as T
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from hf_drt import (
    Adapter,
    Dense,
    DRTCallback,
    DRTConfig,
    DRTSeq2SeqTrainer,
    DRTSeq2SeqTrainingArguments,
    DRTTrainer,
    DRTTrainingArguments,
    DynamicRank,
    Factored,
    form_of,
)
from hf_drt.forms import trainable_weights

CYCLE = "factored@0 dense@2 adapter@4 factored@6 adapter@8 dense@10"


def drt_trainer(folder, kind, **changes):
    return tiny.trainer(folder, model=tiny.MODELS[kind](), kind=kind, drt_schedule=CYCLE, max_steps=12, **changes)


def layers(trainer):
    return [trainer.model.get_submodule(name) for name in trainer.drt.targets]


@pytest.mark.parametrize("kind", tiny.MODELS)
def test_a_whole_cycle_and_back(tmp_path, kind):
    trainer = drt_trainer(tmp_path, kind)
    dense_types = {type(m) for m in map(trainer.model.get_submodule, _targets(trainer))}
    names = list(dict(trainer.model.named_parameters()))
    trainer.train()
    assert {type(m) for m in layers(trainer)} == dense_types
    assert (Conv1D in dense_types) == (kind == "gpt2")
    assert list(dict(trainer.model.named_parameters())) == names
    rows = [row for row in trainer.state.log_history if "drt_switch_seconds" in row]
    assert [row["drt_phase"] for row in rows] == [0, 1, 2, 3, 4, 5]
    # factored -> dense -> adapter keeps the function; adapter -> factored truncates it; then it is kept again
    errors = [row.get("drt_function_error") for row in rows[1:]]
    assert all(error <= 1e-5 for i, error in enumerate(errors, 1) if i != 3), errors
    assert rows[3]["drt_truncation_error"] > 0.01


def _targets(trainer):
    from hf_drt import find_targets

    return find_targets(trainer.model).targets


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_tied_embeddings_stay_tied_in_memory_and_on_disk(tmp_path, kind):
    model = tiny.llama(tie_word_embeddings=True) if kind == "llama" else tiny.MODELS[kind]()
    trainer = tiny.trainer(tmp_path, model=model, kind=kind, save_strategy="steps", save_steps=5)
    trainer.train()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    again = tiny.trainer(
        tmp_path / "b",
        model=tiny.llama(tie_word_embeddings=True) if kind == "llama" else tiny.MODELS[kind](),
        kind=kind,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert again.model.get_input_embeddings().weight is again.model.get_output_embeddings().weight
    assert all(torch.equal(p, q) for p, q in zip(again.model.parameters(), model.parameters(), strict=True))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("kind", tiny.MODELS)
@pytest.mark.parametrize("last", ["factored", "adapter", "dense"])
def test_save_model_writes_a_dense_model_that_loads_without_this_package(tmp_path, kind, last):
    schedule = f"factored@0 dense@2 {last}@4" if last != "dense" else "factored@0 dense@2"
    trainer = tiny.trainer(tmp_path, model=tiny.MODELS[kind](), kind=kind, drt_schedule=schedule, max_steps=6)
    trainer.train()
    forms = [form_of(m) for m in layers(trainer)]
    trainer.save_model()
    assert [form_of(m) for m in layers(trainer)] == forms
    loaded, info = type(trainer.model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch = tiny.batch(kind)
    assert (tiny.logits(loaded, batch) - tiny.logits(trainer.model, batch)).abs().max() <= 1e-5


def test_a_low_rank_checkpoint_fails_loudly_in_plain_transformers(tmp_path, monkeypatch):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "hf_drt")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        T.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-5")
    T.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-10")  # of the dense phase


@pytest.mark.parametrize("policy", ["project", "reset"])
def test_old_parameters_gradients_and_optimizer_state_are_freed(policy):
    model = tiny.llama()
    config = DRTConfig(schedule="dense@0 factored@1 adapter@2 dense@3", rank_multiple=4, moments=policy)
    drt = DynamicRank(model, config, 4)
    drt.apply(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    targets = list(drt.targets)
    for step in range(4):
        old = [weakref.ref(p) for name in targets for p in trainable_weights(model.get_submodule(name))]
        moments = [weakref.ref(v) for p in (r() for r in old) for v in optimizer.state.get(p, {}).values()]
        kept = {id(p) for p in model.parameters()}
        drt.begin_step(step, optimizer)
        now = {id(p) for p in model.parameters()}
        if step > 0:
            gc.collect()
            assert moments
            assert all(ref() is None for ref in moments)
            # base is W itself from dense to adapter, and W is base on the way back: freed is what neither form holds
            assert all(ref() is None or id(ref()) in now & kept for ref in old)
            assert any(ref() is None for ref in old)
            del now, kept
        model(**tiny.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_memory_of_a_dense_phase_is_given_back():
    """Parameters, gradients and optimizer state of the live tensors, counted."""
    model = tiny.llama(hidden_size=128, intermediate_size=256)
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored@1", rank=4), 2)
    drt.apply(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def live():
        gc.collect()
        # Not subclasses that another test in this process has left, which may have no storage of their own.
        tensors = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))
        storages = (t.untyped_storage() for t in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    baseline = live()
    for step in range(2):
        drt.begin_step(step, optimizer)
        model(**tiny.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trainable = sum(p.numel() for p in model.parameters())
    assert live() <= baseline  # dense weights alone outweigh factors with their two moments
    assert trainable * 4 * 3 < baseline


def test_the_metrics_reach_tensorboard(tmp_path):
    trainer = tiny.trainer(tmp_path, report_to=["tensorboard"], drt_log_rank_steps=5, drt_log_rank_per_layer=True)
    trainer.train()
    events = next(p for p in tmp_path.rglob("events.out.tfevents.*"))
    accumulator = EventAccumulator(str(events)).Reload()
    tags = set(accumulator.Tags()["scalars"])
    wanted = {
        "phase", "trainable_parameters", "switch_seconds", "truncation_error", "function_error", "samples_per_second",
        "tokens_per_second", "phase_seconds", "effective_rank_mean", "effective_rank_min",
        "effective_rank/model.layers.0.mlp.up_proj",
    }  # fmt: skip
    assert {f"train/drt_{name}" for name in wanted} <= tags
    phases = [(e.step, e.value) for e in accumulator.Scalars("train/drt_switch_seconds")]
    assert [step for step, _ in phases] == [0, 6, 12, 16]


def test_rows_of_ours_leave_every_row_of_the_loss(tmp_path):
    trainer = tiny.trainer(tmp_path, logging_steps=2, drt_log_rank_steps=4)  # phases end at 6, 12, 16, 20
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == list(range(2, 21, 2))


def test_logged_numbers_are_right(tmp_path):
    trainer = tiny.trainer(tmp_path, drt_log_rank_steps=5, drt_export="native")
    trainer.train()
    history = trainer.state.log_history
    ends = [row for row in history if "drt_phase_steps" in row]
    assert [row["drt_phase_steps"] for row in ends] == [6, 6, 4, 4]
    for row in ends:
        samples = row["drt_phase_steps"] * 8
        assert row["drt_samples_per_second"] * row["drt_phase_seconds"] == pytest.approx(samples, rel=1e-2)
        assert row["drt_tokens_per_second"] * row["drt_phase_seconds"] == pytest.approx(8 * samples, rel=1e-2)
    trainable = [row["drt_trainable_parameters"] for row in history if "drt_switch_seconds" in row]
    assert trainable[-1] == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert trainable[0] == trainable[2] == trainable[3] < trainable[1]
    ranks = [row["drt_effective_rank_mean"] for row in history if "drt_effective_rank_mean" in row]
    expected = []
    for layer in layers(trainer):
        p = torch.linalg.svdvals(layer.weight.detach().double())[:8]
        p = p / p.sum()
        expected.append(math.exp(-(p * p.log()).sum()))
    assert ranks[-1] == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def assert_seconds_add_up(history):
    """Every row of ours has the seconds of all steps and switches before it."""
    spent = 0.0
    for row in (row for row in history if any(key.startswith("drt_") for key in row)):
        spent += row.get("drt_switch_seconds", 0.0) + row.get("drt_phase_seconds", 0.0)
        if "drt_phase" in row:
            assert row["drt_seconds"] == pytest.approx(spent, abs=1e-3)
        else:  # within a phase, whose seconds are logged at its end
            assert row["drt_seconds"] > spent


def test_seconds_count_steps_and_switches_and_nothing_else(tmp_path):
    class SlowSaving(T.TrainerCallback):
        def on_save(self, *args, **kwargs):
            time.sleep(0.2)

    started = time.perf_counter()
    trainer = tiny.trainer(tmp_path, drt_log_rank_steps=5, save_strategy="steps", save_steps=3)
    trainer.add_callback(SlowSaving())
    trainer.train()
    assert_seconds_add_up(trainer.state.log_history)
    total = max(row.get("drt_seconds", 0.0) for row in trainer.state.log_history)
    assert 0 < total < time.perf_counter() - started - 7 * 0.2  # saved at 3, 6, ..., 18, 20
    trainer = tiny.trainer(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert_seconds_add_up(trainer.state.log_history)


def test_evaluation_and_saving_at_the_end_of_each_phase(tmp_path):
    trainer = tiny.trainer(tmp_path, drt_evaluate_at_switch=True, drt_save_at_switch=True)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "eval_loss" in row] == [6, 12, 16]
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-12", "checkpoint-16"}


def test_pretrained_models_start_in_adapter_form_and_new_ones_factored(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "model")
    for model, start, expected in (
        (tiny.llama(), "auto", Factored),
        (T.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), "auto", Adapter),
        (T.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), "scratch", Factored),
        (tiny.llama(), "pretrained", Adapter),
        (T.AutoModelForCausalLM.from_config(T.AutoConfig.from_pretrained(tmp_path / "model")), "auto", Factored),
    ):
        settings = {"drt_schedule": "fixed", "drt_start": start, "drt_export": "native", "max_steps": 1}
        trainer = tiny.trainer(tmp_path / "out", model=model, **settings)
        trainer.train()
        assert {type(form_of(m)) for m in layers(trainer)} == {expected}


def test_seq2seq_trainer_generates_in_every_phase(tmp_path):
    arguments = tiny.arguments(tmp_path, drt_schedule=CYCLE, max_steps=12, drt_evaluate_at_switch=True).to_dict()
    arguments = DRTSeq2SeqTrainingArguments(**arguments, predict_with_generate=True, generation_max_length=6)
    data = tiny.dataset("t5", rows=16)
    trainer = DRTSeq2SeqTrainer(model=tiny.t5(), args=arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert len([row for row in trainer.state.log_history if "eval_loss" in row]) == 5
    assert trainer.predict(data).predictions.shape[0] == 16


def test_the_callback_alone_trains_like_the_trainer(tmp_path):
    ours = tiny.trainer(tmp_path / "a")
    ours.train()
    config = DRTConfig.from_prefixed(ours.args, "drt_")
    callback = DRTCallback(config)
    plain = {k: v for k, v in ours.args.to_dict().items() if not k.startswith("drt_")} | {
        "output_dir": str(tmp_path / "b")
    }
    data = tiny.dataset()
    theirs = T.Trainer(
        model=tiny.llama(attention_dropout=0.1), args=T.TrainingArguments(**plain), train_dataset=data,
        callbacks=[callback],
    )  # fmt: skip
    theirs.train()
    assert all(torch.equal(p, q) for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    assert [r["drt_phase"] for r in theirs.state.log_history if "drt_switch_seconds" in r] == [0, 1, 2, 3]


def test_drt_trainer_resumes_what_the_callback_has_saved(tmp_path):
    ours = tiny.trainer(tmp_path / "a")
    ours.train()
    plain = {k: v for k, v in ours.args.to_dict().items() if not k.startswith("drt_")}
    plain |= {"output_dir": str(tmp_path / "b"), "save_strategy": "steps", "save_steps": 7}
    data = tiny.dataset()
    T.Trainer(
        model=tiny.llama(attention_dropout=0.1), args=T.TrainingArguments(**plain), train_dataset=data,
        callbacks=[DRTCallback(DRTConfig.from_prefixed(ours.args, "drt_"))],
    ).train()  # fmt: skip
    again = tiny.trainer(tmp_path / "c")
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-14"))
    assert all(torch.equal(p, q) for p, q in zip(ours.model.parameters(), again.model.parameters(), strict=True))


def test_settings_may_come_from_a_keyword_in_place_of_the_arguments(tmp_path):
    data = tiny.dataset()
    arguments = T.TrainingArguments(output_dir=str(tmp_path), max_steps=4, report_to=[], save_strategy="no")
    settings = DRTConfig(schedule="dense@0 factored@2", rank=4, export="native")
    trainer = DRTTrainer(model=tiny.llama(), args=arguments, train_dataset=data, drt=settings)
    trainer.train()
    assert {form_of(m) for m in layers(trainer)} == {Factored(4)}


def test_a_users_optimizer_and_scheduler_follow(tmp_path):
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    # The schedule of the paper's CIFAR-10 run, scaled: drops at 100 and 130 of 150 give I = 54 and D = 120.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.1 ** ((k >= 100) + (k >= 130)))
    arguments = tiny.arguments(tmp_path, drt_schedule="paper", max_steps=150, gradient_accumulation_steps=1)
    trainer = DRTTrainer(model=model, args=arguments, train_dataset=tiny.dataset(), optimizers=(optimizer, scheduler))
    trainer.train()
    assert str(trainer.drt.plan) == "factored@0 dense@54 adapter@120"
    assert trainer.optimizer.optimizer is optimizer


def test_model_init_starts_over_with_a_new_controller(tmp_path):
    arguments = tiny.arguments(tmp_path)
    trainer = DRTTrainer(model_init=lambda: tiny.llama(), args=arguments, train_dataset=tiny.dataset())
    trainer.train()
    first = {n: p.clone() for n, p in trainer.model.state_dict().items()}
    controller = trainer.drt
    trainer.train()
    assert trainer.drt is not controller
    assert all(torch.equal(first[n], p) for n, p in trainer.model.state_dict().items())


def test_a_failed_transition_leaves_model_and_optimizer_as_they_were(monkeypatch):
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored@1", rank=4), 2)
    drt.apply(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    weights = {n: (id(p), p.clone()) for n, p in model.named_parameters()}
    groups = [[id(p) for p in g["params"]] for g in optimizer.param_groups]
    with pytest.raises(ValueError, match="holds inf or nan"):
        drt.apply(1, optimizer)
    assert drt.phase == 0
    assert {n: id(p) for n, p in model.named_parameters()} == {n: i for n, (i, _) in weights.items()}
    assert all(torch.equal(p.nan_to_num(), weights[n][1].nan_to_num()) for n, p in model.named_parameters())
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == groups
    assert {type(form_of(model.get_submodule(n))) for n in drt.targets} == {Dense}


def test_the_probe_leaves_training_mode_and_random_numbers_alone(tmp_path):
    """A run with dropout is bitwise the same with the probe and without it."""
    with_probe = tiny.trainer(tmp_path / "a")
    with_probe.train()
    without = tiny.trainer(tmp_path / "b")
    without._drt_loop.probe = lambda: None
    without.train()
    assert all(
        torch.equal(p, q) for p, q in zip(with_probe.model.parameters(), without.model.parameters(), strict=True)
    )


def test_arguments_survive_with_the_checkpoint(tmp_path):
    tiny.trainer(tmp_path, save_strategy="steps", save_steps=10).train()
    stored = torch.load(tmp_path / "checkpoint-10" / "training_args.bin", weights_only=False)
    assert isinstance(stored, DRTTrainingArguments)
    assert stored.drt_schedule == "factored@0 dense@30% adapter@60% factored@80%"
