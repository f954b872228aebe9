"""Resuming with parameter groups of the user's own: bitwise equal to the straight run, whatever the groups go by."""

import copy
import json

import pytest
import tiny
import torch
import transformers as T
from equal_runs import assert_equal_runs

from hf_drt import CheckpointError, DRTCallback, DRTConfig, DRTTrainer, DRTTrainerMixin, DynamicRank
from hf_drt.optim import unwrap

PLAN = "factored@0 dense@3 adapter@6 factored@9"
RUN = {"max_steps": 12, "drt_schedule": PLAN, "weight_decay": 0.1, "drt_export": "native"}


def weights_by_name(trainer):
    return lambda name, p: name.endswith(".weight")


def large(trainer):
    return lambda name, p: p.ndim == 2 and min(p.shape) > 8


def layers(trainer):
    return lambda name, p: ".layers.0." in name


RULES = {"names": weights_by_name, "shapes": large, "layers": layers}


class Grouped(DRTTrainer):
    """Groups of its own; makes them anew whenever it is asked, as scripts do."""

    rule = "names"
    trainable_only = True
    made = 0

    def create_optimizer(self, model=None):
        belongs, groups = RULES[self.rule](self), {True: [], False: []}
        for name, p in self.model.named_parameters():
            if p.requires_grad or not self.trainable_only:
                groups[bool(belongs(name, p))].append(p)
        self.made += 1
        self.optimizer = torch.optim.AdamW(
            [{"params": groups[True], "lr": 2e-3, "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}],
            lr=1e-3,
        )
        return self.optimizer


class Everything(Grouped):
    """Frozen bases of adapters are in it too, until they are W again."""

    trainable_only = False


class Shapes(Grouped):
    rule = "shapes"


class Layers(Grouped):
    rule = "layers"


class Silent(Grouped):
    """Returns nothing, as the Trainer allows."""

    def create_optimizer(self, model=None):
        super().create_optimizer(model)


class Inherited(DRTTrainer):
    """By way of the base, with names as Trainer has them."""

    def get_decay_parameter_names(self, model):
        return [name for name, _ in model.named_parameters() if name.endswith(".weight")]


def compare_all(tmp_path, cls, every=2, make=None, **changes):
    """A straight run, and runs from its checkpoints; returns both kinds."""
    make = make or (lambda folder, **more: tiny.trainer(folder, cls=cls, **{**RUN, **changes, **more}))
    expected = make(tmp_path / "a", save_strategy="steps", save_steps=every)
    expected.train()
    others = []
    for step in range(every, 12, every):
        trainer = make(tmp_path / f"b{step}")
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_equal_runs(trainer, expected)
        others.append(trainer)
    return expected, others


@pytest.mark.sampled(2)
@pytest.mark.parametrize("cls", [Grouped, Shapes, Layers, Silent, Inherited])
def test_groups_by_names_shapes_and_layers_resume_bitwise(tmp_path, cls):
    expected, others = compare_all(tmp_path, cls)
    if hasattr(cls, "made"):
        assert [trainer.made for trainer in (expected, *others)] == [1] * (1 + len(others))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("schedule", ["adapter@0 dense@4 adapter@8", "adapter@0 adapter@4 adapter@8"])
def test_groups_with_frozen_weights_resume_bitwise(tmp_path, schedule):
    compare_all(tmp_path, Everything, drt_schedule=schedule)


def test_groups_by_requires_grad_resume_bitwise_from_an_adapter_phase(tmp_path):
    compare_all(tmp_path, Grouped, drt_schedule="dense@0 adapter@3 dense@7 adapter@9")


class GroupedInside(T.Trainer):
    def create_optimizer(self, model=None):
        Grouped.create_optimizer(self, model)
        return self.optimizer

    rule, trainable_only, made = "names", True, 0


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("sides", "each"), [({}, 2), ({"drt_left_lr_scale": 4.0}, 4)], ids=["forms", "sides"])
def test_form_groups_on_groups_by_name_resume_bitwise(tmp_path, sides, each):
    class Mixed(DRTTrainerMixin, GroupedInside):
        pass

    scales = {"drt_factored_lr_scale": 2.0, "drt_adapter_lr_scale": 0.5, "drt_frobenius_decay": True}
    expected, _ = compare_all(tmp_path, Mixed, drt_rewarmup_steps=2, **scales, **sides)
    assert len(unwrap(expected.optimizer).param_groups) == 2 + each


def test_one_trainer_resumes_twice_with_groups_of_its_own(tmp_path):
    expected = tiny.trainer(tmp_path / "a", cls=Grouped, save_strategy="steps", save_steps=2, **RUN)
    expected.train()
    trainer = tiny.trainer(tmp_path / "b", cls=Grouped, **RUN)
    for step in (10, 2, 6):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert_equal_runs(trainer, expected)
    assert trainer.made == 3


# ---- an optimizer that is made before the first phase


def brought(folder, plan=PLAN, key="params", **changes):
    """``optimizer_cls_and_kwargs`` with groups over the dense model."""
    model = tiny.llama(attention_dropout=0.1)
    split = {True: [], False: []}
    for name, p in model.named_parameters():
        split[name.endswith("_proj.weight")].append(p)
    groups = [{"params": split[True], "lr": 2e-3, "weight_decay": 0.1}, {"params": split[False]}]
    arguments = tiny.arguments(folder, **{**RUN, "drt_schedule": plan, **changes})
    data = tiny.dataset()
    return DRTTrainer(
        model, arguments, train_dataset=data, eval_dataset=data,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {key: groups, "lr": 1e-3}),
    )  # fmt: skip


@pytest.mark.sampled(1)
@pytest.mark.parametrize("key", ["params", "model", "optimizer_dict"])
def test_an_optimizer_class_with_parameters_of_the_dense_model_starts_in_low_rank_and_resumes(tmp_path, key):
    scales = {"drt_factored_lr_scale": 2.0, "drt_rewarmup_steps": 2} if key == "params" else {}
    expected, _ = compare_all(tmp_path, None, make=lambda folder, **more: brought(folder, key=key, **scales, **more))
    names = {id(p): name for name, p in expected.model.named_parameters()}
    groups = unwrap(expected.optimizer).param_groups
    own = [group for group in groups if group["initial_lr"] == 2e-3]
    spliced = [p for group in own for p in group["params"]]
    assert {names[id(p)].rpartition(".")[2] for p in spliced} == {"U", "V"}
    assert len(spliced) == 2 * 14


def test_it_trains_as_a_passed_optimizer_does(tmp_path):
    passed = brought(tmp_path / "a")
    kind, settings = passed.optimizer_cls_and_kwargs
    passed.optimizer, passed.optimizer_cls_and_kwargs = kind(settings.pop("params"), **settings), None
    passed.train()
    trainer = brought(tmp_path / "b")
    trainer.train()
    assert_equal_runs(trainer, passed)


def test_a_start_that_fails_leaves_no_optimizer_and_the_parameters_where_they_were(tmp_path):
    trainer = brought(tmp_path)
    settings = trainer.optimizer_cls_and_kwargs[1]
    groups = settings["params"]
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"holds inf or nan"):
        trainer.train()
    assert trainer.optimizer is None
    assert settings["params"] is groups
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[0, 0] = 0.0
    trainer.train()
    assert trainer.state.global_step == 12


def plain_with_callback(folder):
    """A plain Trainer makes its optimizer over the dense model, before the callback sees it."""

    class Plain(GroupedInside):
        pass

    arguments = T.TrainingArguments(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        report_to=[], learning_rate=3e-3, warmup_steps=2, lr_scheduler_type="cosine", save_strategy="steps",
        save_steps=2, logging_steps=5, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    callback = DRTCallback(DRTConfig(schedule=PLAN, rank_multiple=4, export="native"))
    return Plain(tiny.llama(attention_dropout=0.1), arguments, train_dataset=tiny.dataset(), callbacks=[callback])


@pytest.mark.parametrize("step", [2, 4, 8, 10])
def test_a_checkpoint_of_the_callback_is_resumed_with_its_groups(tmp_path, step):
    expected = plain_with_callback(tmp_path / "a")
    expected.train()
    trainer = tiny.trainer(tmp_path / "b", cls=Grouped, **RUN)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
    assert_equal_runs(trainer, expected)


# ---- a checkpoint that does not fit


def test_other_groups_than_those_of_the_checkpoint_are_refused_and_leave_everything_as_it_was(tmp_path):
    tiny.trainer(tmp_path / "a", cls=Grouped, save_strategy="steps", save_steps=5, **RUN).train()
    trainer = tiny.trainer(tmp_path / "b", cls=Shapes, **RUN)
    before = dict(trainer.model.named_parameters())
    for step in (5, 10):
        with pytest.raises(CheckpointError, match=r"has parameter groups of \[\d+, \d+\] parameters, this run's"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert all(before[name] is p for name, p in trainer.model.named_parameters())
        assert (trainer.optimizer, trainer.drt.phase) == (None, None)


@pytest.mark.parametrize("value", [4, -1, "first"])
def test_a_damaged_phase_of_the_optimizer_is_named(tmp_path, value):
    tiny.trainer(tmp_path / "a", save_strategy="steps", save_steps=5, **RUN).train()
    file = tmp_path / "a" / "checkpoint-5" / "drt_state.json"
    assert "optimizer_made_in" not in file.read_text()
    state = json.loads(file.read_text()) | {"optimizer_made_in": value}
    file.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"'optimizer_made_in' must be a phase in 0\.\.3, or null, got"):
        tiny.trainer(tmp_path / "b", **RUN).train(resume_from_checkpoint=str(file.parent))


# ---- the hand-written loop


@pytest.mark.parametrize("at", [2, 4, 6, 9])
@pytest.mark.parametrize("schedule", ["factored@0 dense@3 adapter@5 factored@8", "adapter@0 dense@3 adapter@5"])
def test_a_loop_with_groups_by_name_is_restored_through_the_phases(schedule, at):
    def started():
        drt = DynamicRank(tiny.llama().eval(), DRTConfig(schedule=schedule, rank=4, adapter_lr_scale=2.0), 10)
        drt.apply(0)
        split = {True: [], False: []}
        for name, p in drt.model.named_parameters():  # frozen bases too
            split[name.endswith(("weight", "base"))].append(p)
        optimizer = torch.optim.AdamW([{"params": split[True], "lr": 1e-2}, {"params": split[False]}], lr=1e-3)
        drt.install(optimizer)
        return drt, optimizer

    def run(drt, optimizer, steps):
        for step in steps:
            drt.begin_step(step, optimizer)
            drt.model(**tiny.batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    straight, optimizer = started()
    run(straight, optimizer, range(at))
    stored = copy.deepcopy((straight.state_dict(), straight.model.state_dict(), optimizer.state_dict()))
    run(straight, optimizer, range(at, 10))
    drt, optimizer = started()
    drt.load_state_dict(stored[0], optimizer)
    drt.model.load_state_dict(stored[1])
    optimizer.load_state_dict(stored[2])
    run(drt, optimizer, range(at, 10))
    for p, q in zip(straight.model.parameters(), drt.model.parameters(), strict=True):
        assert torch.equal(p, q)
