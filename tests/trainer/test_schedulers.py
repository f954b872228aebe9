"""Every scheduler of torch and transformers: a phase begins where a plain Trainer's own log says, or is refused.

``docs/schedulers.md`` is compared with what is found here.
"""

import re
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from curves import (
    SHORT,
    STEPS,
    Options,
    drt_trainer,
    first_above,
    first_below,
    logged,
    plain_trainer,
    starts,
    switches,
)
from torch.optim import lr_scheduler as of_torch
from torch.optim import swa_utils
from transformers import Trainer
from transformers.trainer_utils import SchedulerType

from hf_drt import DRTTrainer
from hf_drt.schedule import lr_drops
from hf_drt.trainer.lr import existing_curve

DOCS = Path(__file__).parents[2] / "docs" / "schedulers.md"
RESOLVES, FOLLOWS, LEVEL = "resolves", "refused: follows a metric", "refused: never changes"
MESSAGES = {
    FOLLOWS: r"'@lr<0\.5' needs a learning-rate schedule that can be evaluated before the run",
    LEVEL: r"'@lr<0\.5' is never reached",
}


def sequential(o):
    parts = [of_torch.LinearLR(o, 0.1, 1.0, total_iters=3), of_torch.ExponentialLR(o, 0.7)]
    return of_torch.SequentialLR(o, parts, milestones=[3])


def chained(o):
    return of_torch.ChainedScheduler([of_torch.ConstantLR(o, 0.5, total_iters=2), of_torch.ExponentialLR(o, 0.8)])


TORCH = {
    "LambdaLR": (lambda o: of_torch.LambdaLR(o, lambda k: 1 / (1 + k)), "lr<0.3", RESOLVES),
    "MultiplicativeLR": (lambda o: of_torch.MultiplicativeLR(o, lambda k: 0.9), "lr<0.5", RESOLVES),
    "StepLR": (lambda o: of_torch.StepLR(o, 4, gamma=0.1), "lr<0.5", RESOLVES),
    "MultiStepLR": (lambda o: of_torch.MultiStepLR(o, [5, 9]), "lr<0.05", RESOLVES),
    "ConstantLR": (lambda o: of_torch.ConstantLR(o, 0.3, total_iters=4), "lr>0.5", RESOLVES),
    "LinearLR": (lambda o: of_torch.LinearLR(o, 1.0, 0.1, total_iters=STEPS), "lr<0.5", RESOLVES),
    "ExponentialLR": (lambda o: of_torch.ExponentialLR(o, 0.8), "lr<0.5", RESOLVES),
    "SequentialLR": (sequential, "lr<0.5", RESOLVES),
    "PolynomialLR": (lambda o: of_torch.PolynomialLR(o, STEPS, power=2.0), "lr<0.5", RESOLVES),
    "CosineAnnealingLR": (lambda o: of_torch.CosineAnnealingLR(o, STEPS, eta_min=1e-3), "lr<0.5", RESOLVES),
    "ChainedScheduler": (chained, "lr<0.5", RESOLVES),
    "CyclicLR": (lambda o: of_torch.CyclicLR(o, 1e-3, 1e-2, step_size_up=3), "lr<0.5", RESOLVES),
    "CosineAnnealingWarmRestarts": (
        lambda o: of_torch.CosineAnnealingWarmRestarts(o, 5, eta_min=1e-3), "lr<0.5", RESOLVES,
    ),
    "OneCycleLR": (lambda o: of_torch.OneCycleLR(o, 1e-2, total_steps=STEPS), "lr<0.5", RESOLVES),
    "ReduceLROnPlateau": (of_torch.ReduceLROnPlateau, "lr<0.5", FOLLOWS),
    "SWALR": (lambda o: swa_utils.SWALR(o, swa_lr=1e-4, anneal_epochs=8), "lr<0.5", RESOLVES),
}  # fmt: skip

EVALUATED = {"eval_strategy": "steps", "eval_steps": 6, "metric_for_best_model": "loss"}
TRANSFORMERS = {
    "linear": ({"warmup_steps": 3}, "lr<0.5", RESOLVES),
    "cosine": ({"warmup_steps": 3}, "lr<0.5", RESOLVES),
    "cosine_with_restarts": ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "lr<0.5", RESOLVES),
    "polynomial": ({"lr_scheduler_kwargs": {"lr_end": 1e-3, "power": 2.0}}, "lr<0.5", RESOLVES),
    "constant": ({}, "lr<0.5", LEVEL),
    "constant_with_warmup": ({"warmup_steps": 6}, "lr>0.5", RESOLVES),
    "inverse_sqrt": ({"warmup_steps": 2, "lr_scheduler_kwargs": {"timescale": 1}}, "lr<0.5", RESOLVES),
    "reduce_lr_on_plateau": (EVALUATED, "lr<0.5", FOLLOWS),
    "cosine_with_min_lr": ({"warmup_steps": 2, "lr_scheduler_kwargs": {"min_lr": 1e-4}}, "lr<0.5", RESOLVES),
    "cosine_warmup_with_min_lr": (
        {"warmup_steps": 2, "lr_scheduler_kwargs": {"min_lr": 1e-4, "warmup_lr_rate": 0.1}}, "lr<0.5", RESOLVES,
    ),
    "warmup_stable_decay": ({"warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 6}}, "lr<0.5", RESOLVES),
    "greedy": (EVALUATED, "lr<0.5", FOLLOWS),
}  # fmt: skip


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)


def adamw(model):
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices, "lr": 2e-3}, {"params": vectors}], lr=1e-2)


OPTIMIZERS = {"SGD": sgd, "AdamW": adamw}


def expected_starts(anchor: str, curve: list[float]) -> list[int]:
    find = first_below if "<" in anchor else first_above
    return [0, find(curve, float(anchor[3:]))]


def compared(tmp_path, anchor, plain, drt) -> None:
    """Both runs are made; the second's phases begin by the first's log, and rates and momentum are the same."""
    plain.train()
    curve = logged(plain)
    drt.train()
    assert len(curve) == STEPS
    assert starts(drt) == switches(drt) == expected_starts(anchor, curve)
    assert logged(drt) == curve
    (seen,), (other,) = ([c.seen for c in t.callback_handler.callbacks if isinstance(c, Options)] for t in (plain, drt))
    assert seen == other


# ---- torch's


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("name", "optimizer"),
    [(name, "SGD") for name, case in TORCH.items() if case[2] == RESOLVES]
    + [("OneCycleLR", "AdamW"), ("CyclicLR", "AdamW"), ("SequentialLR", "AdamW"), ("ExponentialLR", "AdamW")],
)
def test_a_scheduler_of_torch_that_was_passed(tmp_path, name, optimizer):
    """Momentum that is cycled is the same as well; of several groups the first one's rate counts, as in the log."""
    make, anchor, _ = TORCH[name]

    def both():
        model = tiny.llama()
        of = OPTIMIZERS[optimizer](model)
        return {"model": model, "optimizers": (of, make(of)), "callbacks": [Options()]}

    plain = plain_trainer(tmp_path, **both())
    drt = drt_trainer(tmp_path, DRTTrainer, drt_schedule=f"factored@0 dense@{anchor}", **both())
    compared(tmp_path, anchor, plain, drt)


def making(base, make):
    """A trainer that makes its scheduler over ``self.optimizer``."""

    class Making(base):
        def create_scheduler(self, num_training_steps):
            self.lr_scheduler = make(self.optimizer)
            return self.lr_scheduler

    return Making


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [name for name, case in TORCH.items() if case[2] == RESOLVES])
def test_a_scheduler_of_torch_that_an_override_makes(tmp_path, name):
    make, anchor, _ = TORCH[name]
    plain = plain_trainer(tmp_path, making(Trainer, make), callbacks=[Options()])
    cls = making(DRTTrainer, make)
    drt = drt_trainer(tmp_path, cls, callbacks=[Options()], drt_schedule=f"factored@0 dense@{anchor}")
    compared(tmp_path, anchor, plain, drt)


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("name", [name for name, case in TORCH.items() if case[2] != RESOLVES])
def test_a_scheduler_of_torch_that_is_refused(tmp_path, name, passed):
    make, anchor, outcome = TORCH[name]
    model = tiny.llama()
    optimizer = OPTIMIZERS["SGD"](model)
    optimizers = (optimizer, make(optimizer)) if passed else (None, None)
    cls = DRTTrainer if passed else making(DRTTrainer, make)
    schedule = {"drt_schedule": f"factored@0 dense@{anchor}", **EVALUATED}
    refused(drt_trainer(tmp_path, cls, model, optimizers, **schedule), outcome)


def refused(trainer, outcome) -> None:
    before = dict(trainer.model.named_parameters())
    with pytest.raises(ValueError, match=MESSAGES[outcome]):
        trainer.train()
    assert {n: id(p) for n, p in trainer.model.named_parameters()} == {n: id(p) for n, p in before.items()}


# ---- transformers'


@pytest.mark.sampled(6)
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", [name for name, case in TRANSFORMERS.items() if case[2] == RESOLVES])
def test_a_scheduler_of_transformers(tmp_path, name, accumulation):
    settings, anchor, _ = TRANSFORMERS[name]
    settings = {"lr_scheduler_type": name, "gradient_accumulation_steps": accumulation, **settings}
    plain = plain_trainer(tmp_path, callbacks=[Options()], **settings)
    schedule = {"drt_schedule": f"factored@0 dense@{anchor}"}
    compared(tmp_path, anchor, plain, drt_trainer(tmp_path, DRTTrainer, callbacks=[Options()], **schedule, **settings))


@pytest.mark.parametrize("name", [name for name, case in TRANSFORMERS.items() if case[2] != RESOLVES])
def test_a_scheduler_of_transformers_that_is_refused(tmp_path, name):
    settings, anchor, outcome = TRANSFORMERS[name]
    settings = {"lr_scheduler_type": name, "drt_schedule": f"factored@0 dense@{anchor}", **settings}
    refused(drt_trainer(tmp_path, DRTTrainer, **settings), outcome)


# ---- the registries, and the documentation


def test_every_scheduler_has_a_row():
    found = {name for name in of_torch.__all__ if not name.endswith("LRScheduler")} | {"SWALR"}
    assert found == set(TORCH)
    assert {kind.value for kind in SchedulerType} == set(TRANSFORMERS)


ROWS = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", DOCS.read_text(), re.MULTILINE)


def test_the_documentation_says_what_was_found_here():
    found = {name: case[2] for name, case in {**TORCH, **TRANSFORMERS}.items()}
    assert {name: outcome for name, outcome, _ in ROWS} == found
    assert len(ROWS) == len(found)


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for name, _, rule in ROWS])
def test_the_documentation_says_where_I_and_D_come_from(tmp_path, name, rule):
    if name in TORCH:
        make = TORCH[name][0]
    else:
        args = tiny.arguments(tmp_path, **{**SHORT, "lr_scheduler_type": name, **TRANSFORMERS[name][0]})
        make = partial(plain_scheduler, args)
    curve = existing_curve(make(OPTIMIZERS["SGD"](tiny.llama())), STEPS)()
    match rule:
        case "40 % and 80 %":
            assert len(lr_drops(curve)) < 2
        case "from its first and last drop":
            assert len(lr_drops(curve)) >= 2
        case "40 % and 80 %, with a warning":
            assert curve is None
        case _:
            assert re.fullmatch(r"from two drops .*|from two drops, if its parts make them", rule)
            assert curve is not None


def plain_scheduler(args, optimizer):
    """The scheduler that a plain Trainer makes by its arguments."""
    return Trainer(tiny.llama(), args, eval_dataset=tiny.dataset()).create_scheduler(STEPS, optimizer)
