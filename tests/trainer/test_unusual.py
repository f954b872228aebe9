"""What users do beside the straight path: training twice, out of memory, own optimizers, frozen layers, odd models."""

import copy
import shutil

import pytest
import tiny
import torch
import transformers as T

from hf_drt import (
    Adapter,
    CheckpointError,
    Dense,
    DRTCallback,
    DRTConfig,
    DRTTrainer,
    DynamicRank,
    Factored,
    effective_weight,
    form_of,
)
from hf_drt.optim import unwrap

Q = "model.layers.0.self_attn.q_proj"
CONSTANT = {"lr_scheduler_type": "constant", "warmup_steps": 0, "learning_rate": 3e-3}
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB."


def start(schedule: str, model=None, max_steps: int = 4, **settings) -> DynamicRank:
    """A controller whose first phase is in force."""
    config = DRTConfig(schedule=schedule, **{"rank": 4, **settings})
    drt = DynamicRank(tiny.llama() if model is None else model, config, max_steps)
    drt.apply(0)
    return drt


def update(model, optimizer) -> None:
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def forms(trainer) -> set:
    return {form_of(trainer.model.get_submodule(name)) for name in trainer.drt.targets}


def switches(trainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "drt_switch_seconds" in row]


def structure(model) -> dict:
    """Every module and parameter object, by name."""
    return {name: id(part) for part_of in (model.named_modules, model.named_parameters) for name, part in part_of()}


def assert_same(tree, expected) -> None:
    """Two state dicts, of a model or an optimizer, are bitwise equal."""
    assert type(tree) is type(expected)
    if isinstance(expected, dict):
        assert tree.keys() == expected.keys()
        for key in expected:
            assert_same(tree[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(tree) == len(expected)
        for part, other in zip(tree, expected, strict=True):
            assert_same(part, other)
    elif torch.is_tensor(expected):
        assert torch.equal(tree, expected)
    else:
        assert tree == expected


# ---- the learning rate within a step


class Rates(T.TrainerCallback):
    """Records every group's learning rate within the optimizer's step, by form; after hf_drt has set it."""

    def __init__(self):
        self.seen, self._handle = [], None

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        if self._handle is not None:
            self._handle.remove()
        self._handle = unwrap(optimizer).register_step_pre_hook(self._record)  # the last of the hooks

    def _record(self, optimizer, args, kwargs):
        self.seen.append({(g.get("drt_form"), g["lr"]) for g in optimizer.param_groups})


SCALED_ONCE = {(None, 3e-3), ("factored", 6e-3)}


def test_a_second_train_with_another_max_steps_scales_the_learning_rate_once(tmp_path):
    rates = Rates()
    trainer = tiny.trainer(tmp_path, drt_factored_lr_scale=2.0, max_steps=10, **CONSTANT)
    trainer.add_callback(rates)
    trainer.train()
    first = trainer.drt
    trainer.args.max_steps = 20
    trainer.train()
    assert trainer.drt is not first
    assert str(trainer.drt.plan) == "factored@0 dense@6 adapter@12 factored@16"
    assert len(rates.seen) == 30
    assert all(seen == SCALED_ONCE for seen in rates.seen)


class OutOfMemoryOnce(DRTTrainer):
    """Runs out of memory once, in update ``fails_at``: in its forward pass, or in the optimizer's step."""

    fails_at, place = 0, "forward"

    def training_step(self, *args, **kwargs):
        if self.state.global_step == self.fails_at and self.place:
            self._fail()
        return super().training_step(*args, **kwargs)

    def _fail(self):
        place, self.place = self.place, None
        if place == "forward":
            raise RuntimeError(OUT_OF_MEMORY)
        handle = unwrap(self.optimizer).register_step_pre_hook(lambda *_: (handle.remove(), self._raise()))

    def _raise(self):
        raise RuntimeError(OUT_OF_MEMORY)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("place", ["forward", "step"])
@pytest.mark.parametrize("fails_at", [0, 8], ids=["first phase", "second phase"])
def test_auto_find_batch_size_starts_over_and_scales_the_learning_rate_once(tmp_path, fails_at, place):
    rates = Rates()
    trainer = tiny.trainer(
        tmp_path, cls=OutOfMemoryOnce, auto_find_batch_size=True, drt_factored_lr_scale=2.0, drt_rewarmup_steps=0,
        **CONSTANT,
    )  # fmt: skip
    trainer.fails_at, trainer.place = fails_at, place
    trainer.add_callback(rates)
    trainer.train()
    assert trainer.place is None
    assert trainer._train_batch_size < 4
    assert trainer.state.global_step == 20
    assert len(rates.seen) == fails_at + 20 + (place == "step")  # the failed step has had its rates too
    assert all(seen == SCALED_ONCE for seen in rates.seen)
    assert [row["drt_phase"] for row in switches(trainer)] == [0, 1, 2, 3]


def test_a_step_that_raised_leaves_no_scaled_rate_behind():
    drt = start("factored@0 dense@2", factored_lr_scale=2.0)
    optimizer = torch.optim.SGD(drt.model.parameters(), lr=0.1)
    drt.begin_step(0, optimizer)
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    handle.remove()
    drt.install(optimizer)  # as DRTTrainer does when it starts over
    optimizer.step()
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


@pytest.mark.slow
def test_a_run_that_auto_find_batch_size_shrank_can_be_resumed(tmp_path):
    settings = {"auto_find_batch_size": True, "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps"}
    straight = tiny.trainer(tmp_path / "a", cls=OutOfMemoryOnce, save_steps=5, **settings)
    straight.train()
    assert straight.state.train_batch_size < 4
    assert straight.state.max_steps > 2 * 8  # as many as four rows at a time would take
    for step in (5, 10, 20):
        again = tiny.trainer(tmp_path / "b", save_steps=100, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert str(again.drt.plan) == str(straight.drt.plan)
        assert_same(dict(again.model.state_dict()), dict(straight.model.state_dict()))


# ---- optimizers and schedulers that do not fit


def test_an_optimizer_that_is_older_than_the_first_phase_is_refused():
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    drt = start("factored@0 dense@2", model)
    before = structure(model)
    message = (
        rf"the weights of {Q} are not in the optimizer\. Make it after the first phase is in force, .*drt\.apply\(0"
    )
    with pytest.raises(ValueError, match=message):
        drt.begin_step(0, optimizer)
    assert structure(model) == before


def test_a_switch_without_an_optimizer_is_refused():
    drt = start("factored@0 dense@2")
    before = structure(drt.model)
    assert drt.begin_step(1) is None
    message = r"phase 'dense@2' begins at update step 2, but begin_step got no optimizer, .* call apply\(step\)\."
    with pytest.raises(ValueError, match=message):
        drt.begin_step(2)
    assert (drt.phase, structure(drt.model)) == (0, before)


def test_factors_in_different_groups_are_refused():
    drt = start("factored@0 dense@2")
    parts = {True: [], False: []}
    for name, parameter in drt.model.named_parameters():
        parts[name.endswith(".U")].append(parameter)
    optimizer = torch.optim.AdamW([{"params": parts[True], "lr": 1e-2}, {"params": parts[False]}])
    with pytest.raises(ValueError, match=rf"the weights of {Q} are in different parameter groups of the optimizer"):
        drt.begin_step(0, optimizer)


def test_a_scheduler_that_is_older_than_the_form_groups_is_refused():
    drt = start("factored@0 dense@2", factored_lr_scale=2.0)
    optimizer = torch.optim.AdamW(drt.model.parameters())
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"Call drt\.install\(optimizer\) before making the scheduler"):
        drt.begin_step(0, optimizer)
    assert len(optimizer.param_groups) == 1


def test_a_scheduler_made_after_install_is_taken():
    drt = start("factored@0 dense@2", factored_lr_scale=2.0)
    optimizer = torch.optim.AdamW(drt.model.parameters())
    drt.install(optimizer)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    for step in range(4):
        drt.begin_step(step, optimizer)
        update(drt.model, optimizer)
        scheduler.step()
    assert drt.phase == 1


def test_param_names_follow_a_switch():
    drt = start("factored@0 dense@1 adapter@2 factored@3")
    optimizer = torch.optim.AdamW(drt.model.named_parameters())
    for step, suffix in enumerate((".U", ".weight", ".lora_A", ".U")):
        drt.begin_step(step, optimizer)
        (group,) = optimizer.param_groups
        parameters = dict(drt.model.named_parameters())
        assert Q + suffix in group["param_names"]
        assert [id(parameters[name]) for name in group["param_names"]] == [id(p) for p in group["params"]]
        assert {n for n, p in parameters.items() if p.requires_grad} <= set(group["param_names"])
        update(drt.model, optimizer)


# ---- boundaries


def test_boundaries_in_epochs_count_a_last_and_shorter_accumulation(tmp_path):
    """20 rows in batches of 4, two to an update: 5 batches, 3 updates an epoch."""
    arguments = tiny.arguments(
        tmp_path, drt_schedule="factored@0 dense@1ep adapter@3ep", max_steps=-1, num_train_epochs=4
    )
    trainer = DRTTrainer(tiny.llama(), arguments, train_dataset=tiny.dataset(rows=20))
    trainer.train()
    assert trainer.state.global_step == 12
    assert str(trainer.drt.plan) == "factored@0 dense@3 adapter@9"
    assert [row["step"] for row in switches(trainer)] == [0, 3, 9]
    assert [row["epoch"] for row in switches(trainer)] == [0, 1, 3]


def test_the_paper_preset_takes_the_drops_of_a_users_multistep_schedule(tmp_path):
    model = tiny.llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [20, 26], gamma=0.1)
    arguments = tiny.arguments(tmp_path, drt_schedule="paper", max_steps=30, gradient_accumulation_steps=1)
    trainer = DRTTrainer(model, arguments, train_dataset=tiny.dataset(), optimizers=(optimizer, scheduler))
    trainer.train()
    # I = 0.54 * 20 = 10.8 and D = 20 + 2/3 * 6 = 24; shares of the run would be 12 and 24
    assert str(trainer.drt.plan) == "factored@0 dense@11 adapter@24"


# ---- settings


def test_a_schedule_given_as_text_keeps_the_other_arguments(tmp_path):
    arguments = tiny.arguments(tmp_path, drt_schedule="factored@0", drt_rank=4, drt_export="native", max_steps=1)
    trainer = DRTTrainer(tiny.llama(), arguments, train_dataset=tiny.dataset(), drt="factored@0")
    trainer.train()
    assert forms(trainer) == {Factored(4)}


def test_a_rank_that_changes_between_two_runs_of_model_init_is_honoured(tmp_path):
    arguments = tiny.arguments(tmp_path, drt_schedule="factored@0", drt_rank=4, drt_export="native", max_steps=1)
    trainer = DRTTrainer(args=arguments, train_dataset=tiny.dataset(), model_init=lambda: tiny.llama())
    trainer.train()
    assert forms(trainer) == {Factored(4)}
    trainer.args.drt_rank = 6
    trainer.train()
    assert forms(trainer) == {Factored(6)}


def test_a_callback_that_is_added_later_is_checked_when_training_begins(tmp_path):
    arguments = T.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, report_to=[], load_best_model_at_end=True, save_strategy="steps",
        save_steps=2, eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    data = tiny.dataset()
    trainer = T.Trainer(tiny.llama(), arguments, train_dataset=data, eval_dataset=data)
    trainer.add_callback(DRTCallback(DRTConfig(schedule="factored@0 dense@2", rank=4)))
    before = structure(trainer.model)
    with pytest.raises(ValueError, match=r"load_best_model_at_end loads weights of one phase .* Use DRTTrainer"):
        trainer.train()
    assert structure(trainer.model) == before
    assert trainer.state.global_step == 0


def test_a_drt_trainer_refuses_a_second_callback(tmp_path):
    callback = DRTCallback(DRTConfig(schedule="factored@0 dense@2", rank=4))
    with pytest.raises(ValueError, match=r"DRTCallback is part of this trainer\. Pass its settings as drt="):
        DRTTrainer(tiny.llama(), tiny.arguments(tmp_path), train_dataset=tiny.dataset(), callbacks=[callback])


# ---- models


class OwnLoss(DRTTrainer):
    """Calls the model in its own way; the model knows no other."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(everything={**inputs, "num_items_in_batch": num_items_in_batch})
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_probe_that_the_model_does_not_answer_stops_nothing(tmp_path, caplog):
    model = tiny.llama()
    forward = model.forward
    model.forward = lambda everything=None, **kwargs: forward(**dict(everything.items()))
    trainer = tiny.trainer(tmp_path, model, cls=OwnLoss, remove_unused_columns=False)
    trainer.train()
    assert trainer.state.global_step == 20
    assert "no function-preservation error: " in caplog.text
    assert "object has no attribute 'items'" in caplog.text
    rows = switches(trainer)
    assert [row["drt_phase"] for row in rows] == [0, 1, 2, 3]
    assert not any("drt_function_error" in row for row in rows)
    assert all({"drt_truncation_error", "drt_merge_error", "drt_trainable_parameters"} <= row.keys() for row in rows)
    usual = tiny.trainer(tmp_path, tiny.llama())
    usual.train()
    assert all("drt_function_error" in row for row in switches(usual)[1:])
    assert_same(dict(trainer.model.state_dict()), dict(usual.model.state_dict()))


@pytest.mark.parametrize("moments", ["reset", "project"])
def test_a_layer_that_is_frozen_in_mid_run_stays_frozen_over_every_switch(moments):
    drt = start("factored@0 dense@1 adapter@2 dense@3 factored@4", max_steps=5, moments=moments)
    optimizer = torch.optim.AdamW(drt.model.parameters(), lr=1e-2, weight_decay=0.0)
    drt.begin_step(0, optimizer)
    update(drt.model, optimizer)
    drt.model.get_submodule(Q).requires_grad_(False)
    other = Q.replace("q_proj", "k_proj")
    frozen, trained = (effective_weight(drt.model.get_submodule(name)).clone() for name in (Q, other))
    for step, form in enumerate((Dense, Adapter, Dense, Factored), 1):
        drt.begin_step(step, optimizer)
        update(drt.model, optimizer)
        assert type(form_of(drt.model.get_submodule(Q))) is form
        assert not any(p.requires_grad for p in drt.model.get_submodule(Q).parameters())
        assert any(p.requires_grad for p in drt.model.get_submodule(other).parameters())
        # of rank 4 all along, so that not even the last truncation changes it
        torch.testing.assert_close(effective_weight(drt.model.get_submodule(Q)), frozen, rtol=1e-4, atol=1e-6)
    assert (effective_weight(drt.model.get_submodule(other)) - trained).abs().max() > 1e-3


def test_a_merge_that_half_precision_loses_is_logged_and_warned_of(tmp_path, caplog):
    settings = {**CONSTANT, "learning_rate": 1e-7, "drt_schedule": "adapter@0 dense@2", "max_steps": 3}
    trainer = tiny.trainer(tmp_path / "bf16", tiny.llama().to(torch.bfloat16), **settings)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert [row["drt_merge_error"] > 0.1 for row in switches(trainer)] == [False, True]
    assert "update step 2: rounding to the weights' dtype loses" in caplog.text
    caplog.clear()
    trainer = tiny.trainer(tmp_path / "fp32", **settings)
    trainer.train()
    assert all(row["drt_merge_error"] < 0.1 for row in switches(trainer))
    assert "rounding" not in caplog.text


def test_nan_at_inflation_is_refused_and_leaves_the_model_as_it_was():
    drt = start("factored@0 dense@2")
    model = drt.model
    optimizer = torch.optim.AdamW(model.parameters())
    drt.begin_step(0, optimizer)
    update(model, optimizer)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.V[0, 0] = float("nan")
    before, weights = structure(model), copy.deepcopy(model.state_dict())
    groups, state = [[id(p) for p in g["params"]] for g in optimizer.param_groups], set(map(id, optimizer.state))
    with pytest.raises(ValueError, match=r"V of a layer of shape .* holds inf or nan\. The training has diverged"):
        drt.begin_step(2, optimizer)
    assert (drt.phase, structure(model)) == (0, before)
    assert all(torch.equal(p.nan_to_num(), weights[n].nan_to_num()) for n, p in model.state_dict().items())
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == groups
    assert set(map(id, optimizer.state)) == state


def test_a_hook_that_is_set_after_the_controller_was_built_is_warned_of_at_the_switch(caplog):
    drt = start("factored@0 dense@2")
    optimizer = torch.optim.AdamW(drt.model.parameters())
    drt.model.get_submodule(Q).register_forward_hook(lambda *_: None)
    drt.begin_step(0, optimizer)
    assert "behaviour of its own" not in caplog.text
    drt.begin_step(2, optimizer)
    assert caplog.text.count("which is lost as it changes form") == 1
    assert f"{Q} has got behaviour of its own since it was selected (hooked (forward)), which is lost" in caplog.text


def pretrained(folder):
    tiny.llama().save_pretrained(folder)
    return T.AutoModelForCausalLM.from_pretrained(folder)


def test_a_copy_of_a_pretrained_model_is_warned_of_where_it_is_taken_for_a_new_one(tmp_path, caplog):
    model = copy.deepcopy(pretrained(tmp_path / "model"))
    trainer = tiny.trainer(tmp_path / "out", model, drt_schedule="paper", max_steps=10)
    trainer.train()
    assert trainer.drt.plan.phases[0].kind == "factored"
    assert "set start='pretrained': truncation would destroy them" in caplog.text
    assert f"'{tmp_path / 'model'}'" in caplog.text


def test_truncating_a_pretrained_model_on_purpose_is_warned_of(tmp_path, caplog):
    model = pretrained(tmp_path / "model")
    trainer = tiny.trainer(tmp_path / "out", model, drt_schedule="factored@0 dense@50%", max_steps=2)
    trainer.train()
    assert "phase 'factored@0' truncates pretrained weights" in caplog.text
    caplog.clear()
    model = pretrained(tmp_path / "model")
    trainer = tiny.trainer(
        tmp_path / "out", model, drt_schedule="lowrank@0 dense@50%", max_steps=2, drt_start="scratch"
    )
    trainer.train()
    assert "truncating" not in caplog.text


# ---- resuming in one trainer


@pytest.mark.parametrize("scale", [1.0, 2.0], ids=["no form groups", "form groups"])
def test_a_refused_checkpoint_between_two_resumes_leaves_everything_as_it_was(tmp_path, scale):
    straight = tiny.trainer(tmp_path / "a", save_strategy="steps", save_steps=5, drt_factored_lr_scale=scale)
    straight.train()
    factored, dense = tmp_path / "a" / "checkpoint-5", tmp_path / "a" / "checkpoint-10"
    mixed = tmp_path / "mixed"
    shutil.copytree(dense, mixed)
    shutil.copy(factored / "optimizer.pt", mixed / "optimizer.pt")

    trainer = tiny.trainer(tmp_path / "b", drt_factored_lr_scale=scale)
    trainer.train(resume_from_checkpoint=str(factored))
    optimizer = unwrap(trainer.optimizer)
    before, phase = structure(trainer.model), trainer.drt.phase
    weights, state = (copy.deepcopy(part.state_dict()) for part in (trainer.model, optimizer))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt"):
        trainer.train(resume_from_checkpoint=str(mixed))
    assert (trainer.drt.phase, structure(trainer.model)) == (phase, before)
    assert_same(dict(trainer.model.state_dict()), dict(weights))
    assert unwrap(trainer.optimizer) is optimizer
    assert_same(optimizer.state_dict(), state)

    trainer.train(resume_from_checkpoint=str(dense))
    assert_same(dict(trainer.model.state_dict()), dict(straight.model.state_dict()))
    assert_same(optimizer.state_dict()["state"], unwrap(straight.optimizer).state_dict()["state"])


def test_a_second_callback_added_later_is_refused(tmp_path):
    trainer = tiny.trainer(tmp_path)
    trainer.add_callback(DRTCallback("factored@0"))
    with pytest.raises(ValueError, match=r"DRTCallback is part of this trainer"):
        trainer.train()


@pytest.mark.parametrize(
    "change", [{"drt_factored_lr_scale": 3.0}, {"drt_left_lr_scale": 3.0}, {"drt_frobenius_decay": True}], ids=str
)
def test_group_settings_cannot_change_between_two_runs_of_one_trainer(tmp_path, change):
    trainer = tiny.trainer(tmp_path, drt_factored_lr_scale=2.0, max_steps=4, drt_schedule="factored@0 dense@2")
    trainer.train()
    for name, value in change.items():
        setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=r"cannot change between two train\(\) calls with one optimizer"):
        trainer.train()


# ---- the hand-written loop


@pytest.mark.parametrize("schedule", ["adapter@0 dense@3 adapter@6", "factored@0 dense@3 adapter@6"])
@pytest.mark.parametrize("everything", [True, False], ids=["all parameters", "trainable ones"])
def test_every_weight_is_stepped_once_whatever_the_optimizer_was_made_over(schedule, everything):
    """A frozen base in the optimizer must not stand there twice when it is W again."""
    drt = start(schedule, max_steps=8)
    optimizer = torch.optim.AdamW([p for p in drt.model.parameters() if everything or p.requires_grad])
    for step in range(8):
        drt.begin_step(step, optimizer)
        drt.model(**tiny.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        params = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(params) == len(set(params))
        assert {id(p) for p in drt.model.parameters() if p.requires_grad} <= set(params)


@pytest.mark.parametrize("at", [2, 3, 5, 6, 7])
def test_a_loop_saved_and_restored_as_the_readme_says_goes_on_bitwise(at):
    def run(first, drt, optimizer, last=8):
        for step in range(first, last):
            drt.begin_step(step, optimizer)
            drt.model(**tiny.batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def made(drt):
        return torch.optim.AdamW(p for p in drt.model.parameters() if p.requires_grad)

    schedule = "adapter@0 dense@3 factored@6"
    straight = start(schedule, max_steps=8)
    run(0, straight, made(straight))
    first = start(schedule, max_steps=8)
    optimizer = made(first)
    run(0, first, optimizer, at)
    stored = copy.deepcopy((first.state_dict(), first.model.state_dict(), optimizer.state_dict()))
    second = DynamicRank(tiny.llama(), first.config, 8)
    second.load_state_dict(stored[0])
    second.model.load_state_dict(stored[1])
    optimizer = made(second)
    optimizer.load_state_dict(stored[2])
    run(at, second, optimizer)
    for p, q in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_pretrained_model_is_recognised_without_a_trainer(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    model = T.LlamaForCausalLM.from_pretrained(tmp_path)
    drt = DynamicRank(model, DRTConfig(schedule="fixed", rank=4), 4)
    assert str(drt.plan) == "adapter@0"


@pytest.mark.parametrize("option", ["include", "exclude", "rank_pattern"])
def test_a_pattern_that_matches_nothing_is_named_in_the_log(caplog, option):
    value = {"nosuch": 4} if option == "rank_pattern" else ["nosuch", "proj"] if option == "include" else ["nosuch"]
    DynamicRank(tiny.llama(), DRTConfig(schedule="factored@0", rank=4, **{option: value}), 4)
    assert f"{option}: 'nosuch' matches none of the" in caplog.text
