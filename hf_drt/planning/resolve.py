"""Are a model's weights pretrained, or drawn at random? Truncation to factors would destroy pretrained ones."""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.forms import AdapterLinear, FactoredLinear, weight_shape
from hf_drt.planning.cost import relative_flops
from hf_drt.planning.evidence import evidence_of_training
from hf_drt.planning.ranks import resolve_form
from hf_drt.schedule import Plan, Run, Schedule, Trigger, least_budget
from hf_drt.targets import copies, find_targets

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


def resolved_plan(schedule: Schedule, run: Run, config: DRTConfig, model: nn.Module, resumed: bool = False) -> Plan:
    """The plan, with 'lowrank' resolved by where the weights come from, and a warning where that may be wrong.

    What 'lowrank' means for a model is remembered: its own training is no sign that it began with trained weights.

    Args:
        schedule: Of the settings.
        run: Its length, epochs and learning rate; the budget is that of the settings.
        config: All settings.
        model: Whose weights and layers are looked at.
        resumed: Whether a run goes on, so that the forms of the model are its own and say nothing of its beginning.

    Raises:
        ValueError: As :meth:`hf_drt.schedule.Schedule.resolve`, and as :func:`lowrank_kind`.
    """
    return resolution(schedule, run, config, model, resumed).plan(run.lr)


def resolution(schedule: Schedule, run: Run, config: DRTConfig, model: nn.Module, resumed: bool = False) -> Resolution:
    """All of :func:`resolved_plan` that does not depend on the learning rate: the model may change form afterwards."""
    lowrank = lowrank_kind(schedule, config, model, resumed)
    if _writes_lowrank(schedule) and not resumed:
        _report(lowrank, config, model)
    if _writes_lowrank(schedule):
        _DECIDED[_bare(model)] = lowrank
    kinds = {lowrank if entry.kind == "lowrank" else entry.kind for entry in schedule.entries}
    run = replace(run, budget=budget_of(config, kinds), cost=_cost_of_forms(model, config))
    if config.budget is None and config.budget_chooses_rank and lowrank == "factored":
        run = replace(run, budget=max(run.budget, least_budget(lowrank, run)))
    factored = next((entry for entry in schedule.entries if entry.kind == "factored"), None)
    in_factors = any(isinstance(module, FactoredLinear) for module in model.modules())
    if lowrank == "adapter" and factored is not None and not in_factors:
        logger.warning(
            "phase '%s' truncates pretrained weights, which usually destroys them; adapter form keeps them.",
            factored,
        )
    return Resolution(schedule, run, lowrank)


def plan_from(config: DRTConfig, max_steps: int | None, model: nn.Module) -> tuple[Plan, Trigger | None]:
    """Plan and trigger of a run whose schedule needs nothing but its length.

    Raises:
        ValueError: There is no schedule or no length, and as :func:`resolved_plan`.
    """
    if config.schedule is None or max_steps is None:
        raise ValueError("DynamicRank needs either a plan, or config.schedule and max_steps.")
    schedule = Schedule.parse(config.schedule)
    return resolved_plan(schedule, Run(max_steps), config, model), schedule.trigger


def lowrank_kind(schedule: Schedule, config: DRTConfig, model: nn.Module, resumed: bool = False) -> str:
    """What 'lowrank' stands for: 'adapter' for a pretrained model, 'factored' for a new one.

    With start='auto' the mark of ``from_pretrained`` decides. Without it a model is new, unless its normalisation
    layers have been trained (:mod:`hf_drt.planning.evidence`); arguments as in :func:`resolved_plan`.

    Raises:
        ValueError: The schedule has 'lowrank', start is 'auto', and weights without a mark have been trained.
    """
    if config.start != "auto":
        return "adapter" if config.start == "pretrained" else "factored"
    decided = _DECIDED.get(_bare(model))
    if resumed and decided is not None:
        return decided
    if is_pretrained(model):
        return "adapter"
    if decided is not None:
        return decided
    if _writes_lowrank(schedule) and (sign := evidence_of_training(model).sign) is not None:
        raise ValueError(
            f"'lowrank' in the schedule '{schedule}' stands for factored form in a new model, and for adapter form in "
            "a pretrained one, whose weights a truncation would destroy. No weight bears the mark of from_pretrained, "
            f"but the model has been trained: {sign}. Set start='pretrained' (drt_start) to keep what it has learned, "
            "or start='scratch' to truncate its weights."
        )
    return "factored"


# Weakly by model, so that a second run on it is not taken for a model that came trained.
_DECIDED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # of torch.compile


def _writes_lowrank(schedule: Schedule) -> bool:
    return any(entry.kind == "lowrank" for entry in schedule.entries)


def _warn_of_own_training(model: nn.Module) -> None:
    """A further run on a model that an earlier one has trained, and left dense, begins by truncating it."""
    in_factors = any(isinstance(module, FactoredLinear) for module in model.modules())
    if not in_factors and (sign := evidence_of_training(model).sign) is not None:
        logger.warning(
            "'lowrank' is taken as factored form, as in the run before on this model, which has trained it since "
            "(%s): its weights are truncated. Set start='pretrained' to go on from them in adapters.",
            sign,
        )


def _report(lowrank: str, config: DRTConfig, model: nn.Module) -> None:
    """Say in the log that a model has been taken for a new one, and how sure that is."""
    if config.start != "auto" or lowrank != "factored":
        return
    if _bare(model) in _DECIDED:
        _warn_of_own_training(model)
        return
    if origin := getattr(getattr(model, "config", None), "name_or_path", ""):
        logger.warning(
            "'lowrank' is taken as factored form, since no weight bears the mark of from_pretrained, but the model's "
            "configuration is that of '%s'. If the weights are pretrained (a copy, or load_state_dict), set "
            "start='pretrained': truncation would destroy them.",
            origin,
        )
    elif evidence_of_training(model).looked == 0:
        logger.warning(
            "'lowrank' is taken as factored form, for a new model: no weight bears the mark of from_pretrained, and "
            "there is no normalisation layer that would show training. If the weights have been trained, set "
            "start='pretrained': truncation would destroy them."
        )
    else:
        logger.info("'lowrank' is taken as factored form: the weights are new. Set start='pretrained' if they are not.")


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
        targets = find_targets(model, **config.selection).targets
        shapes = {n: weight_shape(m) for n, m in targets.items()}
        forms = [resolve_form(kind, shape, config, name, rank) for name, shape in shapes.items()]
        return relative_flops(list(shapes.values()), forms, [copies(model, n, m) for n, m in targets.items()])

    return cost
