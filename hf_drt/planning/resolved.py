"""A plan on a model, resolved once and handed on: phases, target layers, the form of each in every phase, and cost."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from hf_drt.config import DRTConfig
from hf_drt.forms import Form
from hf_drt.planning.cost import PlanCost, plan_cost
from hf_drt.planning.groups import group_numbers
from hf_drt.planning.layers import FrozenDict, TargetLayers
from hf_drt.planning.paces import Paces
from hf_drt.planning.ranks import resolve_form
from hf_drt.schedule import LOW_RANK, Part, Phase, Plan, Trigger, provisional

Forms = FrozenDict[str, Form]


@dataclass(frozen=True)
class ResolvedPlan:
    """All that is known of a run before it begins; nothing of it changes.

    Attributes:
        plan: The phases, in update steps.
        targets: The layers that change form.
        forms_by_phase: For every phase the form of every target layer, by name.
        cost: What the plan takes of dense training of the target layers.
        config: The settings that ranks, forms and selection come from, settled.
        trigger: Adds full-rank windows during the run; None without one.
        lowrank: What 'lowrank' in the schedule stands for; None where the plan was made by hand.
        budget: Share of the dense training FLOPs of the target layers that is in force, where one decides anything.
        outline: Whether only number, kind and rank of the phases hold, until the run's learning rate is known.
        paces: What the layers' seconds were measured to be, where the budget has decided a dtype.
    """

    plan: Plan
    targets: TargetLayers
    forms_by_phase: tuple[Forms, ...]
    cost: PlanCost
    config: DRTConfig
    trigger: Trigger | None = None
    lowrank: str | None = None
    budget: float | None = None
    outline: bool = False
    paces: Paces | None = None

    @classmethod
    def of(
        cls,
        plan: Plan,
        targets: TargetLayers,
        config: DRTConfig,
        *,
        trigger: Trigger | None = None,
        lowrank: str | None = None,
        budget: float | None = None,
        outline: bool = False,
        paces: Paces | None = None,
        known: Mapping[tuple, Forms] | None = None,
    ) -> "ResolvedPlan":
        """The plan on these layers; ``known`` are forms by kind and rank of a phase, where some are at hand."""
        config = config.settled(lowrank or _lowrank_of(plan))
        forms = tuple(_forms_by_phase(plan, targets, config, dict(known or {})))
        cost = plan_cost(
            plan, list(targets.shapes.values()), [list(f.values()) for f in forms], list(targets.copies.values())
        )
        return cls(plan, targets, forms, cost, config, trigger, lowrank, budget, outline, paces)

    @property
    def measured(self) -> dict[str, dict[str, float]]:
        """What a state keeps of measurements that have decided the plan: ``paces``, if there are any."""
        return {} if self.paces is None else {"paces": dict(self.paces.table)}

    @property
    def splits(self) -> bool:
        """Whether adapters are split as their rank changes (``adapter_init='split'``)."""
        return self.config.adapter_init == "split" and any("adapter" in phase.kinds for phase in self.plan.phases)

    def parts(self, phase: int) -> dict[str, Part]:
        """The layers that a phase brings into a form, all or those of its groups, by the part that they are in."""
        return _parts(provisional(self.plan).phases[phase], self.targets, self.config)

    def restarts(self, phase: int, before: int | None) -> Collection[str]:
        """Layers that a phase brings into a form anew, re-balanced factors or a merged and renewed adapter, where they
        are in it: all of one of the same kind as the phase ``before``, those that a mixed one names; none where it
        differs in its dtype alone."""
        phases = self.plan.phases
        if before is None or phase == before or self.plan.recasts(before, phase):
            return ()
        if not phases[phase].parts and phases[phase].kind != phases[before].kind:
            return ()
        return self.parts(phase)

    def trains_dense(self, phase: int) -> bool:
        """Whether the plan has a layer dense, and trained, in a phase. One that a setting or its rank keeps dense where
        it has it factored does not count."""
        kinds: dict[str, str] = {}
        for index in range(phase + 1):
            kinds |= {name: part.kind for name, part in self.parts(index).items()}
        return "dense" in kinds.values()

    def groups(self, count: int) -> dict[str, int]:
        """:func:`hf_drt.planning.groups.group_numbers` of the target layers."""
        return group_numbers(self.targets.shapes, count, self.config)

    def with_plan(self, plan: Plan) -> "ResolvedPlan":
        """Other phases on the same layers, by the same settings: a plan that has grown by full-rank windows."""
        phases = zip(self.plan.phases, self.forms_by_phase, strict=True)
        known = {_key(phase.whole[0]): forms for phase, forms in phases if not phase.parts}
        return self.of(
            plan,
            self.targets,
            self.config,
            trigger=self.trigger,
            lowrank=self.lowrank,
            budget=self.budget,
            outline=self.outline,
            paces=self.paces,
            known=known,
        )

    def with_config(self, config: DRTConfig, plan: Plan | None = None) -> "ResolvedPlan":
        """The same layers under other settings, which select alike."""
        plan = plan or self.plan
        return self.of(plan, self.targets, config, lowrank=self.lowrank, budget=self.budget, paces=self.paces)


def forms_of(kind: str, rank: int | float | None, targets: TargetLayers, config: DRTConfig) -> Forms:
    """The form of every target layer in a phase of some kind and rank."""
    return FrozenDict({name: resolve_form(kind, shape, config, name, rank) for name, shape in targets.shapes.items()})


def _forms_by_phase(plan: Plan, targets: TargetLayers, config: DRTConfig, known: dict[tuple, Forms]) -> Iterator[Forms]:
    """Of each phase in turn; where the run decides whose turn it is, as if groups had theirs in ascending order."""
    forms = FrozenDict[str, Form]()
    for phase in provisional(plan).phases:
        for part in phase.whole:
            if (key := _key(part)) not in known:
                known[key] = forms_of(part.kind, cast(float | None, part.rank), targets, config)  # no 'budget' any more
        if phase.parts:
            changed = {name: known[_key(part)][name] for name, part in _parts(phase, targets, config).items()}
            forms = FrozenDict({**forms, **changed})
        else:
            forms = known[_key(phase.whole[0])]
        yield forms


def _parts(phase: Phase, targets: TargetLayers, config: DRTConfig) -> dict[str, Part]:
    whole, *rest = phase.whole
    if whole.group is None:
        return dict.fromkeys(targets.shapes, whole)
    parts = {part.group.number: part for part in (whole, *rest) if part.group is not None}
    numbers = group_numbers(targets.shapes, whole.group.of, config)
    return {name: parts[number] for name, number in numbers.items() if number in parts}


def _lowrank_of(plan: Plan) -> str | None:
    """What 'lowrank' stands for in a plan made by hand: the form of its first phase in low rank."""
    return next((phase.kind for phase in plan.phases if phase.kind in LOW_RANK), None)


def _key(part: Part) -> tuple:
    return part.kind, type(part.rank), part.rank
