"""An export that a phase of the plan, or the engine, does not have is refused before the run."""

from types import SimpleNamespace

import pytest
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_drt import (
    Schedule,
)
from hf_drt.export import check_export
from hf_drt.export.dense import DenseExporter
from hf_drt.registry import EXPORTERS
from hf_drt.schedule import Run


def pushing(**changes) -> SimpleNamespace:
    """Training arguments of a run that pushes."""
    given = {"push_to_hub": True, "hub_strategy": HubStrategy.EVERY_SAVE, "save_strategy": SaveStrategy.STEPS}
    return SimpleNamespace(**given | changes)


class Whole(DenseExporter):
    """A form of which it is not known how to write it by a state dict that has been gathered."""

    sharded = False


@pytest.fixture
def whole():
    EXPORTERS.add("whole", Whole())
    yield
    EXPORTERS.remove("whole")


def plan_of(text: str):
    return Schedule.parse(text).resolve(Run(8))


@pytest.mark.parametrize(
    ("export", "schedule", "changes", "fsdp", "message"),
    [
        ("adapter", "adapter@0 dense@4", {"push_to_hub": False}, False, r"'dense.*' they are dense\. End the schedule"),
        (
            "adapter",
            "factored@0",
            {"push_to_hub": False},
            False,
            r"saves layers in adapter form, but in phase 'factored",
        ),
        ("adapter", "dense@0 adapter@4", {}, False, r"in phase 'dense.*' they .* push with hub_strategy=end; or use"),
        (
            "whole",
            "adapter@0",
            {},
            True,
            r"export=whole needs the whole model, and no process holds it under FSDP or DeepSpeed.* Use export=d",
        ),
    ],
)
def test_an_export_that_a_phase_or_an_engine_does_not_have_is_refused(whole, export, schedule, changes, fsdp, message):
    with pytest.raises(ValueError, match=message):
        check_export(export, plan_of(schedule), pushing(**changes), fsdp)


@pytest.mark.parametrize("found", [{"hub_strategy": HubStrategy.END}, {"save_strategy": SaveStrategy.NO}], ids=str)
def test_a_push_of_the_last_model_alone_asks_nothing_of_earlier_phases(found):
    check_export("adapter", plan_of("dense@0 adapter@4"), pushing(**found), sharded=False)
    check_export("dense", plan_of("dense@0 adapter@4"), pushing(**found), sharded=True)


@pytest.mark.parametrize("strategy", [s for s in HubStrategy if s != HubStrategy.END])
def test_a_dense_export_is_pushed_during_training(strategy):
    for fsdp in (False, True):
        check_export("dense", plan_of("factored@0 dense@4"), pushing(hub_strategy=strategy), fsdp)
