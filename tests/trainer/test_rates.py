"""Phases at a learning rate that is not ``learning_rate`` of the arguments: wherever optimizer and scheduler come from,
a phase begins where a plain Trainer's own log says, after resuming and in every later run too."""

import logging

import pytest
import tiny
import torch
from curves import STEPS, drt_trainer, first_below, logged, plain_trainer, starts, switches
from equal_runs import assert_equal_runs
from torch.optim import AdamW
from torch.optim import lr_scheduler as of_torch
from transformers import Trainer, set_seed

from hf_drt import DRTCallback, DRTTrainer
from hf_drt.checkpoint.state_file import CheckpointError

# Ends at 1e-3: half of the peak comes at another step from 1e-2 than from the arguments' rate of 3e-3.
POLYNOMIAL = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-3}}
SAVED = {"save_strategy": "steps", "save_steps": 1}
LOW = "factored@0 dense@lr<0.5"


def grouped(model):
    """Two groups, of which the first has a rate of its own."""
    norms = [p for n, p in model.named_parameters() if "norm" in n]
    others = [p for n, p in model.named_parameters() if "norm" not in n]
    return AdamW([{"params": norms, "lr": 2e-3}, {"params": others}], lr=1e-2)


def making_optimizer(base):
    class Making(base):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = grouped(self.model)
            return self.optimizer

    return Making


def extending_optimizer(base):
    class Extending(base):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = grouped(self.model)
            return super().create_optimizer()

    return Extending


def halving(base):
    """A scheduler made over ``self.optimizer``, whatever optimizer is given; without one among its arguments."""

    class Halving(base):
        def create_scheduler(self, num_training_steps, optimizer=None):
            if self.lr_scheduler is None:
                self.lr_scheduler = of_torch.MultiStepLR(self.optimizer, [5, 9], gamma=0.1)
                self._created_lr_scheduler = True
            return self.lr_scheduler

    return Halving


def own(base):
    return base


def passed(model):
    return {"optimizers": (AdamW(model.parameters(), lr=1e-2), None)}


def by_class(model):
    return {"more": {"optimizer_cls_and_kwargs": (AdamW, {"lr": 1e-2})}}


def nothing(model):
    return {}


# how the class is made, what is given to it, its arguments
WAYS = {
    "passed optimizer": (own, passed, POLYNOMIAL),
    "passed optimizer, warm-up": (own, passed, POLYNOMIAL | {"warmup_steps": 3}),
    "optimizer_cls_and_kwargs": (own, by_class, POLYNOMIAL),
    "optimizer_cls_and_kwargs, above the arguments' rate": (
        own, by_class, {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 4e-3}},
    ),
    "create_optimizer": (making_optimizer, nothing, POLYNOMIAL),
    "create_optimizer, form groups": (extending_optimizer, nothing, POLYNOMIAL | {"drt_factored_lr_scale": 2.0}),
    "create_scheduler": (halving, nothing, {}),
    "create_scheduler, passed optimizer": (halving, passed, {}),
    "create_optimizer and create_scheduler": (lambda base: halving(making_optimizer(base)), nothing, {}),
    "the arguments": (own, nothing, POLYNOMIAL),
}  # fmt: skip


def build(folder, way, base=DRTTrainer, make=drt_trainer, **changes):
    derive, given, settings = WAYS[way]
    model = tiny.llama(attention_dropout=0.1)
    return make(folder, derive(base), model, **given(model), **{"drt_schedule": LOW, **settings, **changes})


def plain(folder, way):
    derive, given, settings = WAYS[way]
    model = tiny.llama(attention_dropout=0.1)
    settings = {key: value for key, value in settings.items() if not key.startswith("drt_")}
    trainer = plain_trainer(folder, derive(Trainer), model, **given(model), **settings)
    trainer.train()
    return trainer


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
def test_a_phase_begins_where_the_plain_trainers_log_says_in_every_run(tmp_path, way):
    expected = plain(tmp_path / "plain", way)
    curve = logged(expected)
    trainer = build(tmp_path / "drt", way)
    trainer.train()
    assert starts(trainer) == switches(trainer) == [0, first_below(curve, 0.5)]
    assert logged(trainer) == curve
    assert 0 < first_below(curve, 0.5) < STEPS

    expected.train()
    trainer.train()
    assert logged(trainer) == logged(expected)
    assert starts(trainer)[1] == switches(trainer)[-1] == first_below(logged(expected), 0.5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
def test_resuming_is_bitwise_before_and_after_the_switch(tmp_path, way):
    straight = build(tmp_path, way, **SAVED)
    straight.train()
    switch = starts(straight)[1]
    for step in (1, switch):
        trainer = build(tmp_path / "again", way)
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert starts(trainer) == [0, switch]
        assert_equal_runs(trainer, straight)
        assert not trainer.drt.resolved.outline


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", [*WAYS, "passed scheduler"])
def test_resuming_in_the_same_trainer_is_bitwise(tmp_path, way):
    def new(folder):
        if way != "passed scheduler":
            return build(folder, way, **SAVED)
        model = tiny.llama(attention_dropout=0.1)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        scheduler = of_torch.PolynomialLR(optimizer, STEPS, power=2.0)
        return drt_trainer(folder, DRTTrainer, model, (optimizer, scheduler), drt_schedule=LOW, **SAVED)

    straight = new(tmp_path / "a")
    straight.train()
    trainer = new(tmp_path / "b")
    trainer.train()
    for step in (2, 8):
        trainer.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{step}"))
        assert starts(trainer) == starts(straight)
        assert_equal_runs(trainer, straight)


@pytest.mark.parametrize("way", ["passed optimizer", "optimizer_cls_and_kwargs", "create_optimizer"])
def test_a_checkpoint_of_another_curve_is_refused(tmp_path, way):
    build(tmp_path, way, **SAVED).train()
    other = build(tmp_path / "again", way, lr_scheduler_kwargs={"lr_end": 1e-3, "power": 3.0})
    with pytest.raises(
        CheckpointError, match=r"checkpoint-3 does not fit this run: the plan has changed: the state is"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize("way", ["optimizer_cls_and_kwargs", "create_optimizer"])
def test_a_checkpoint_of_other_phases_is_refused(tmp_path, way):
    build(tmp_path, way, **SAVED).train()
    other = build(tmp_path / "again", way, drt_schedule="factored@0 adapter@lr<0.5")
    with pytest.raises(CheckpointError, match=r"the plan has changed: the state is of 'factored@0 dense@\d+' over 12"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", WAYS)
def test_an_anchor_that_the_real_rates_never_reach_is_refused(tmp_path, way):
    """Known late or early, the model is what it was, and trains on another schedule afterwards."""
    trainer = build(tmp_path, way, drt_schedule="factored@0 dense@lr<0.001")
    before = {name: (id(p), p.clone()) for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=r"'@lr<0\.001' is never reached: after its peak"):
        trainer.train()
    assert {name: id(p) for name, p in trainer.model.named_parameters()} == {n: i for n, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in trainer.model.named_parameters())
    trainer.args.drt_schedule = LOW
    trainer.train()
    assert starts(trainer) == switches(trainer) == [0, first_below(logged(trainer), 0.5)]


def test_a_boundary_at_budget_follows_the_anchor(tmp_path):
    """Of 12 steps those after the anchor are known, so that the budget decides the rest anew."""
    schedule = {"drt_schedule": "factored:4@0 dense@budget adapter:4@lr<0.5", "drt_budget": 0.7}
    late = build(tmp_path / "late", "optimizer_cls_and_kwargs", **schedule)
    late.train()
    known = build(tmp_path / "known", "passed optimizer", **schedule)
    known.train()
    assert starts(late) == starts(known) == switches(late)
    anchor = starts(late)[2]
    assert anchor == first_below(logged(late), 0.5)
    steps = {"drt_schedule": f"factored:4@0 dense@budget adapter:4@{anchor}", "drt_budget": 0.7}
    written = build(tmp_path / "written", "the arguments", **steps)
    written.train()
    assert starts(written) == starts(late)


def test_a_search_resolves_every_trial_anew(tmp_path):
    found = []

    class Watching(DRTTrainer):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = AdamW(self.model.parameters(), lr=self.args.learning_rate)
            return super().create_optimizer()

    args = tiny.arguments(tmp_path, max_steps=STEPS, logging_steps=1, drt_schedule=LOW, **POLYNOMIAL)
    trainer = Watching(model_init=lambda: tiny.llama(), args=args, train_dataset=tiny.dataset())
    for rate in (2.5e-3, 2e-2):
        trainer.args.learning_rate = rate
        trainer.train()
        found.append(starts(trainer)[1])
        assert found[-1] == first_below(logged(trainer), 0.5)
    assert found[0] > found[1]


# ---- simulating leaves everything alone


@pytest.mark.parametrize("tensor", [False, True], ids=["a number", "a tensor"])
@pytest.mark.parametrize("closure", [False, True], ids=["self.optimizer", "its own"])
@pytest.mark.parametrize("cycled", [False, True], ids=["drops", "cycled momentum"])
def test_simulating_leaves_the_real_optimizer_as_it_was(tmp_path, tensor, closure, cycled):
    model = tiny.llama()
    rate = torch.tensor(1e-2) if tensor else 1e-2
    optimizer = AdamW(model.parameters(), lr=rate, foreach=False)

    class Making(DRTTrainer):
        def create_scheduler(self, num_training_steps, optimizer_of_nobody=None):
            real = optimizer if closure else self.optimizer
            self.made = True
            if cycled:
                self.lr_scheduler = of_torch.OneCycleLR(real, 1e-2, total_steps=STEPS)
            else:
                self.lr_scheduler = of_torch.MultiStepLR(real, [5, 9])
            return self.lr_scheduler

    trainer = drt_trainer(tmp_path, Making, model, (optimizer, None), drt_schedule="paper")
    attributes, options = dict(vars(optimizer)), [dict(group) for group in optimizer.param_groups]
    own = dict(vars(trainer))
    curve = trainer._drt_rates.expected(STEPS, resumed=False)
    assert (curve is None) == closure  # over the real one it says nothing yet, and is not stepped
    assert vars(optimizer) == attributes
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0].keys() == options[0].keys()
    assert all(optimizer.param_groups[0][key] is value for key, value in options[0].items())
    assert float(rate) == pytest.approx(1e-2)
    assert "step" not in vars(optimizer)
    assert all(vars(trainer)[name] is value for name, value in own.items())
    assert vars(trainer).keys() == own.keys()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("optimizers", [passed, nothing])
def test_the_papers_preset_trains_at_the_full_rate(tmp_path, optimizers):
    """Drops at 5 and 9 of 12: I = 0.54 d1, D = d1 + 2/3 (d2 - d1). Bitwise the run with these steps written out, and
    the rates of a plain Trainer, in a second run too."""

    def new(folder, base, **settings):
        model = tiny.llama()
        return drt_trainer(folder, halving(base), model, **optimizers(model), **settings)

    plain, written = new(tmp_path, Trainer), new(tmp_path, DRTTrainer, drt_schedule="factored@0 dense@3 adapter@8")
    trainer = new(tmp_path, DRTTrainer, drt_schedule="paper", drt_start="scratch")
    for _ in range(2):
        for one in (plain, written, trainer):
            set_seed(0)
            one.train()
        assert starts(trainer) == [0, 3, 8]
        assert logged(trainer) == logged(plain)
        assert_equal_runs(trainer, written)


def test_a_scheduler_that_cannot_be_made_over_a_stand_in_is_read_off_the_run(tmp_path):
    def strict(base):
        class Strict(base):
            def create_scheduler(self, num_training_steps, optimizer=None):
                if len(self.optimizer.param_groups[0]["params"]) < 2:
                    raise RuntimeError("this optimizer trains nothing")
                self.lr_scheduler = of_torch.ExponentialLR(self.optimizer, 0.8)
                return self.lr_scheduler

        return Strict

    plain = plain_trainer(tmp_path, strict(Trainer))
    plain.train()
    trainer = drt_trainer(tmp_path, strict(DRTTrainer), drt_schedule=LOW, **SAVED)
    trainer.train()
    assert starts(trainer) == switches(trainer) == [0, first_below(logged(plain), 0.5)]
    again = drt_trainer(tmp_path / "again", strict(DRTTrainer), drt_schedule=LOW)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal_runs(again, trainer)


def test_a_scheduler_that_calls_the_trainer_does_not_copy_it(tmp_path):
    class Calling(DRTTrainer):
        def rate(self, step):
            return 0.8**step

        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = of_torch.LambdaLR(self.optimizer, self.rate)
            return self.lr_scheduler

        def __deepcopy__(self, memo):
            raise AssertionError("the trainer is copied, with its model and data")

    trainer = drt_trainer(tmp_path, Calling, drt_schedule=LOW)
    trainer.train()
    assert starts(trainer) == switches(trainer) == [0, 4]


@pytest.mark.parametrize("done", [0, 3])
def test_a_passed_scheduler_counts_from_where_it_stands(tmp_path, done):
    """Stepped already, and taken on in a second run."""

    def new(folder, base):
        model = tiny.llama()
        optimizer = AdamW(model.parameters(), lr=torch.tensor(1e-2), foreach=False)
        scheduler = of_torch.CosineAnnealingLR(optimizer, 4, eta_min=1e-4)
        for _ in range(done):
            optimizer.step()
            scheduler.step()
        return drt_trainer(folder, base, model, (optimizer, scheduler), drt_schedule=LOW)

    plain, trainer = new(tmp_path, Trainer), new(tmp_path, DRTTrainer)
    for _ in range(2):
        plain.train()
        trainer.train()
        assert logged(trainer) == logged(plain)
        assert starts(trainer) == [0, first_below(logged(plain), 0.5)]


def test_a_scheduler_that_ends_too_early_says_why_it_is_unknown(tmp_path, caplog):
    model = tiny.llama()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    scheduler = of_torch.OneCycleLR(optimizer, 1e-2, total_steps=6)
    trainer = drt_trainer(tmp_path, DRTTrainer, model, (optimizer, scheduler), drt_schedule=LOW)
    with pytest.raises(ValueError, match=r"'@lr<0\.5' needs a learning-rate schedule that can be evaluated"):
        trainer.train()
    assert (
        "the learning rate of OneCycleLR is not known before the run: ValueError: Tried to step 7 times" in caplog.text
    )


# ---- on its own, with a gradient scaler, unknown


@pytest.mark.sampled(3)
@pytest.mark.parametrize("way", [way for way in WAYS if "form groups" not in way])
def test_the_callback_alone_begins_where_the_log_says(tmp_path, way):
    expected = plain(tmp_path / "plain", way)
    trainer = build(tmp_path, way, Trainer, drt_schedule=None, callbacks=[DRTCallback(LOW)])
    trainer.train()
    found = [row["step"] for row in trainer.state.log_history if "drt_switch_seconds" in row]
    assert found == [0, first_below(logged(expected), 0.5)]


def scaling(folder, base, poisoned=None, optim="adamw_torch", **settings):
    """A trainer with a gradient scaler, one of whose updates overflows."""

    class Scaling(base):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.state.global_step == poisoned:
                next(p for p in model.parameters() if p.grad is not None).grad[0] = float("inf")
            return loss

    trainer = drt_trainer(folder, Scaling, max_grad_norm=0, optim=optim, **settings)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    return trainer


def rates_of(trainer) -> list[float]:
    trainer.train()
    return logged(trainer)


def test_an_update_that_is_left_out_delays_the_rates_and_so_anchors_are_refused(tmp_path):
    calm, poisoned = (rates_of(scaling(tmp_path, Trainer, step, drt_schedule=None)) for step in (None, 2))
    assert poisoned == [*calm[:3], *calm[2:-1]]
    trainer = scaling(tmp_path, DRTTrainer, drt_schedule=LOW)
    refused = r"'dense@lr<0\.5' cannot be resolved before a run in fp16: .* in bf16, or use a fused optimizer \(optim="
    with pytest.raises(ValueError, match=refused):
        trainer.train()
    assert trainer.optimizer is None  # nothing has been made
    with pytest.raises(ValueError, match=refused):
        scaling(tmp_path, Trainer, drt_schedule=None, callbacks=[DRTCallback(LOW)]).train()
    with pytest.raises(ValueError, match=refused):
        scaling(tmp_path, making_optimizer(DRTTrainer), drt_schedule=LOW).train()
    scaling(tmp_path, DRTTrainer, 2, drt_schedule="factored@0 dense@50%").train()


def test_a_fused_optimizer_keeps_the_rates_where_an_update_is_left_out(tmp_path):
    fused = {"optim": "adamw_torch_fused"}
    calm, poisoned = (rates_of(scaling(tmp_path, Trainer, step, drt_schedule=None, **fused)) for step in (None, 2))
    assert poisoned == calm
    trainer = scaling(tmp_path, DRTTrainer, 2, drt_schedule=LOW, **fused)
    assert rates_of(trainer) == calm
    assert starts(trainer) == switches(trainer) == [0, first_below(calm, 0.5)]


@pytest.mark.parametrize(
    ("kind", "warns"), [("reduce_lr_on_plateau", True), ("greedy", True), ("cosine", False), ("constant", False)]
)
def test_the_papers_steps_under_an_unknown_rate_are_shares_with_a_warning(tmp_path, caplog, kind, warns):
    evaluated = {"eval_strategy": "steps", "eval_steps": 6, "metric_for_best_model": "loss"}
    trainer = drt_trainer(tmp_path, DRTTrainer, drt_schedule="paper", lr_scheduler_type=kind, **evaluated)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert starts(trainer) == [0, 5, 10]
    lines = [
        r.getMessage() for r in caplog.records if "the learning rate is not known before the run" in r.getMessage()
    ]
    assert [line[:11] for line in lines] == (["boundary I:", "boundary D:"] if warns else [])
