"""Are a model's weights pretrained, or drawn at random? Truncation to factors would destroy pretrained ones."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.cost import relative_flops
from hf_drt.experts import copies
from hf_drt.forms import AdapterLinear, FactoredLinear, resolve_form, weight_shape
from hf_drt.schedule import Plan, Run, Schedule, least_budget
from hf_drt.selection import find_targets

logger = logging.getLogger(__name__)


def is_pretrained(model: nn.Module) -> bool:
    """True if weights of the model came out of ``from_pretrained``, which marks the parameters that it loads, or if
    layers are in adapter form: those stand on weights that have been trained.

    ``config.name_or_path`` does not tell: ``from_config`` on a downloaded configuration sets it too. A deep copy and
    ``load_state_dict`` lose the mark.
    """
    marked = any(getattr(p, "_is_hf_initialized", False) for p in model.parameters())
    return marked or any(isinstance(module, AdapterLinear) for module in model.modules())


@dataclass(frozen=True)
class Resolution:
    """A schedule on a model, as far as it can be resolved without the run's learning rate.

    Attributes:
        schedule: As written.
        run: The run, with budget and costs.
        lowrank: What 'lowrank' stands for.
    """

    schedule: Schedule
    run: Run
    lowrank: str

    def plan(self, lr: Callable[[], Sequence[float] | None]) -> Plan:
        """The plan under a learning rate (:class:`hf_drt.schedule.Run`).

        Raises:
            ValueError: As :meth:`hf_drt.schedule.Schedule.resolve`.
        """
        return self.schedule.resolve(replace(self.run, lr=lr), self.lowrank)

    def outline(self) -> Plan:
        """:meth:`hf_drt.schedule.Schedule.outline`."""
        return self.schedule.outline(self.run, self.lowrank)


def resolved_plan(schedule: Schedule, run: Run, config: DRTConfig, model: nn.Module) -> Plan:
    """The plan, with 'lowrank' resolved by where the weights come from, and a warning where that may be wrong.

    Raises:
        ValueError: As :meth:`hf_drt.schedule.Schedule.resolve`, and where a rank is given twice.
    """
    return resolution(schedule, run, config, model).plan(run.lr)


def resolution(schedule: Schedule, run: Run, config: DRTConfig, model: nn.Module) -> Resolution:
    """All of :func:`resolved_plan` that does not depend on the learning rate: the model may change form afterwards."""
    pretrained = is_pretrained(model) if config.start == "auto" else config.start == "pretrained"
    origin = getattr(getattr(model, "config", None), "name_or_path", "")
    if config.start == "auto" and not pretrained and origin and any(e.kind == "lowrank" for e in schedule.entries):
        logger.warning(
            "'lowrank' is taken as factored form, since no weight bears the mark of from_pretrained, but the model's "
            "configuration is that of '%s'. If the weights are pretrained (a copy, or load_state_dict), set "
            "start='pretrained': truncation would destroy them.",
            origin,
        )
    lowrank = "adapter" if pretrained else "factored"
    kinds = {lowrank if entry.kind == "lowrank" else entry.kind for entry in schedule.entries}
    if config.rank is not None and any(entry.rank == "budget" for entry in schedule.entries):
        raise ValueError(
            f"rank is {config.rank}, but the schedule '{schedule}' chooses the rank by the budget. Leave rank out, or "
            "write its phases with this rank: 'lowrank@0 dense@budget'."
        )
    run = replace(run, budget=budget_of(config, kinds), cost=_cost_of_forms(model, config))
    if config.budget is None and config.budget_chooses_rank and lowrank == "factored":
        run = replace(run, budget=max(run.budget, least_budget(lowrank, run)))
    factored = next((entry for entry in schedule.entries if entry.kind == "factored"), None)
    if pretrained and factored is not None and not any(isinstance(m, FactoredLinear) for m in model.modules()):
        logger.warning(
            "phase '%s' truncates pretrained weights, which usually destroys them; adapter form keeps them.",
            factored,
        )
    return Resolution(schedule, run, lowrank)


def budget_of(config: DRTConfig, kinds: set[str]) -> float:
    """The budget in force for phases of these kinds: an adapter alone takes more than 2/3 of the dense FLOPs, and where
    the rank is free 0.3 was as good as more (``recipes/benchmarks/RESULTS.md``)."""
    if config.budget is not None:
        return config.budget
    if "adapter" in kinds:
        return 0.9
    return 0.3 if config.budget_chooses_rank else 0.4


def _cost_of_forms(model: nn.Module, config: DRTConfig) -> Callable[[str, int | float | None], float]:
    """FLOPs of a step of the target layers in a phase of some kind and rank, relative to dense."""

    def cost(kind: str, rank: int | float | None) -> float:
        targets = find_targets(model, config.include, config.exclude).targets
        shapes = {n: weight_shape(m) for n, m in targets.items()}
        forms = [resolve_form(kind, shape, config, name, rank) for name, shape in shapes.items()]
        return relative_flops(list(shapes.values()), forms, [copies(model, n, m) for n, m in targets.items()])

    return cost
