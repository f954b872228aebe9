"""From a schedule to a resolved plan: what 'lowrank' and the budget stand for on a model."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.forms import check_quantizer
from hf_drt.planning.cost import relative_flops
from hf_drt.planning.dtypes import check_weights
from hf_drt.planning.layers import FrozenDict, TargetLayers
from hf_drt.planning.origin import decide, lowrank_kind
from hf_drt.planning.paces import Paces, measured_paces
from hf_drt.planning.resolved import ResolvedPlan, forms_of
from hf_drt.schedule import Plan, Run, Schedule, Trigger


@dataclass(frozen=True)
class Resolution:
    """A schedule on a model, as far as it can be resolved without the run's learning rate.

    Attributes:
        config: All settings, with a schedule, settled for ``lowrank``.
        targets: The model's target layers.
        run: The run, with budget and costs.
        lowrank: What 'lowrank' stands for.
        paces: Of the layers here, where the budget decides a dtype.
    """

    config: DRTConfig
    targets: TargetLayers
    run: Run
    lowrank: str
    paces: Paces | None = None

    @property
    def schedule(self) -> Schedule:
        """As written."""
        return schedule_of(self.config)

    def plan(self, lr: Callable[[], Sequence[float] | None]) -> ResolvedPlan:
        """The plan under a learning rate (:class:`hf_drt.schedule.Run`).

        Raises:
            ValueError: As :meth:`hf_drt.schedule.Schedule.resolve`.
        """
        return self._resolved(self.schedule.resolve(replace(self.run, lr=lr), self.lowrank), outline=False)

    def outline(self) -> ResolvedPlan:
        """:meth:`hf_drt.schedule.Schedule.outline`."""
        return self._resolved(self.schedule.outline(self.run, self.lowrank), outline=True)

    def _resolved(self, plan: Plan, outline: bool) -> ResolvedPlan:
        return ResolvedPlan.of(
            plan,
            self.targets,
            self.config,
            trigger=self.schedule.trigger,
            lowrank=self.lowrank,
            budget=self.run.budget if self.schedule.uses_budget else None,
            outline=outline,
            paces=self.paces,
        )


def resolution(
    config: DRTConfig,
    run: Run,
    model: nn.Module,
    targets: TargetLayers | None = None,
    resumed: bool = False,
    known: Callable[[], Mapping[str, float] | None] = lambda: None,
) -> Resolution:
    """All of :func:`resolved_plan` that does not depend on the learning rate: the model may change form afterwards.

    Args:
        known: Gives the paces that the run has measured before (:class:`.Paces`), if it has; asked where a budget of
            seconds needs them.
    """
    targets = targets if targets is not None else TargetLayers.of(model, config)
    lowrank = lowrank_kind(schedule_of(config), config, model, resumed)
    config = config.settled(lowrank)
    schedule = schedule_of(config)
    decide(lowrank, schedule, config, model, resumed)
    budget = budget_of(config, schedule.kinds(lowrank))
    run = replace(run, budget=budget, cost=_cost_of_forms(targets, config))
    paces = None
    if schedule.budget_chooses_dtype:
        if (before := known()) is not None:
            paces = Paces(FrozenDict(before))
        else:
            paces = measured_paces(targets, config, schedule.kinds(lowrank), _device_of(model))
        run = replace(run, seconds=_seconds_of_forms(targets, config, paces))
    if config.budget is None and config.budget_chooses_rank and lowrank == "factored":
        run = replace(run, budget=max(budget, schedule.least_budget(run, lowrank)))
    return Resolution(config, targets, run, lowrank, paces)


def _device_of(model: nn.Module) -> str:
    """The type of the device that it will train on, as far as that can be told: a model without data may be sent to
    any."""
    kind = next(model.parameters()).device.type
    return kind if kind != "meta" else "cuda" if torch.cuda.is_available() else "cpu"


def settled(config: DRTConfig, model: nn.Module, resumed: bool = False) -> DRTConfig:
    """The settings as a plan on a model has them (:meth:`hf_drt.DRTConfig.settled`); they have a schedule.

    Raises:
        ValueError: As :func:`lowrank_kind`.
    """
    return config.settled(lowrank_kind(schedule_of(config), config, model, resumed))


def resolved_plan(
    config: DRTConfig, run: Run, model: nn.Module, targets: TargetLayers | None = None, resumed: bool = False
) -> ResolvedPlan:
    """The plan on a model, with 'lowrank' resolved by where the weights come from, and a warning where that may be
    wrong.

    Args:
        config: All settings, with a schedule.
        run: Its length, epochs and learning rate; the budget is that of the settings.
        model: Whose weights are looked at.
        targets: Its target layers, where they are known already.
        resumed: Whether a run goes on, so that the forms of the model are its own and say nothing of its beginning.

    Raises:
        ValueError: There is no schedule; as :meth:`hf_drt.schedule.Schedule.resolve`, and as :func:`lowrank_kind`.
    """
    return resolution(config, run, model, targets, resumed).plan(run.lr)


def resolved_for(
    model: nn.Module,
    config: DRTConfig,
    max_steps: int | None = None,
    plan: Plan | ResolvedPlan | None = None,
    trigger: Trigger | None = None,
) -> ResolvedPlan:
    """The plan of a run of which no more is known than this: as it is, resolved phases on the model's layers, or the
    settings' schedule over its length.

    Raises:
        ValueError: There is neither a plan nor a schedule and a length; the plan was resolved under other settings, or
            has a trigger beside its own; and as :func:`resolved_plan`, :func:`.check_weights`; or
            bases are to be kept in int8, and torchao is not installed.
    """
    resolved = _resolved_for(model, config, max_steps, plan, trigger)
    check_quantizer(resolved.config.frozen_dtype)
    check_weights(model, resolved.plan)
    return resolved


def _resolved_for(
    model: nn.Module,
    config: DRTConfig,
    max_steps: int | None,
    plan: Plan | ResolvedPlan | None,
    trigger: Trigger | None,
) -> ResolvedPlan:
    if isinstance(plan, ResolvedPlan):
        if plan.config != config.settled(plan.config.lowrank) or trigger is not None:
            other = "with a trigger of its own" if trigger is not None else "under other settings"
            raise ValueError(
                f"the plan '{plan.plan}' was resolved {other}. Pass the settings that it was made with (plan.config), "
                "and no trigger; or resolve it anew."
            )
        return plan
    if plan is not None:
        return ResolvedPlan.of(plan, TargetLayers.of(model, config), config, trigger=trigger)
    if config.schedule is None or max_steps is None:
        raise ValueError("DynamicRank needs either a plan, or config.schedule and max_steps.")
    return resolved_plan(config, Run(max_steps), model)


def schedule_of(config: DRTConfig) -> Schedule:
    """That of the settings.

    Raises:
        ValueError: There is none.
    """
    if config.parsed is None:
        raise ValueError("there is no schedule, of which a plan is made. Set schedule, e.g. schedule='auto'.")
    return config.parsed


def budget_of(config: DRTConfig, kinds: Collection[str]) -> float:
    """The budget in force for phases of these kinds: an adapter alone takes more than 2/3 of the dense FLOPs, and where
    the rank is free 0.3 was as good as more (``recipes/benchmarks/RESULTS.md``); a preset may have one of its own."""
    if config.budget is not None:
        return config.budget
    if "adapter" in kinds:
        return 0.9
    if config.preset is not None and config.preset.budget is not None:
        return config.preset.budget
    return 0.3 if config.budget_chooses_rank else 0.4


def _cost_of_forms(targets: TargetLayers, config: DRTConfig) -> Callable[[str, int | float | None], float]:
    """FLOPs of a step of the target layers in a phase of some kind and rank, relative to dense."""
    shapes, counts = list(targets.shapes.values()), list(targets.copies.values())

    @lru_cache(maxsize=None, typed=True)  # 1 is a rank, 1.0 a share
    def cost(kind: str, rank: int | float | None) -> float:
        return relative_flops(shapes, list(forms_of(kind, rank, targets, config).values()), counts)

    return cost


def _seconds_of_forms(
    targets: TargetLayers, config: DRTConfig, paces: Paces
) -> Callable[[str, int | float | None, str], float]:
    """Seconds of a step of the target layers in a phase of some kind, rank and dtype, relative to dense in fp32."""
    shapes, counts = list(targets.shapes.values()), list(targets.copies.values())

    @lru_cache(maxsize=None, typed=True)
    def seconds(kind: str, rank: int | float | None, dtype: str) -> float:
        return paces.seconds(list(forms_of(kind, rank, targets, config).values()), shapes, counts, dtype)

    return seconds
