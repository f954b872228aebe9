"""A plan on a model, resolved once and handed on: phases, target layers, the form of each in every phase, and cost."""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_drt.config import DRTConfig
from hf_drt.forms import Form
from hf_drt.planning.cost import PlanCost, plan_cost
from hf_drt.planning.layers import Frozen, TargetLayers
from hf_drt.planning.ranks import resolve_form
from hf_drt.schedule import Phase, Plan, Trigger

Forms = Frozen[str, Form]


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
        known: Mapping[tuple, Forms] | None = None,
    ) -> "ResolvedPlan":
        """The plan on these layers; ``known`` are forms by kind and rank of a phase, where some are at hand."""
        config = config.settled(lowrank or _lowrank_of(plan))
        known = dict(known or {})
        for phase in plan.phases:
            if _key(phase) not in known:
                known[_key(phase)] = forms_of(phase.kind, phase.rank, targets, config)
        forms = tuple(known[_key(phase)] for phase in plan.phases)
        cost = plan_cost(
            plan, list(targets.shapes.values()), [list(f.values()) for f in forms], list(targets.copies.values())
        )
        return cls(plan, targets, forms, cost, config, trigger, lowrank, budget, outline)

    def with_plan(self, plan: Plan) -> "ResolvedPlan":
        """Other phases on the same layers, by the same settings: a plan that has grown by full-rank windows."""
        known = {_key(phase): forms for phase, forms in zip(self.plan.phases, self.forms_by_phase, strict=True)}
        return self.of(
            plan,
            self.targets,
            self.config,
            trigger=self.trigger,
            lowrank=self.lowrank,
            budget=self.budget,
            outline=self.outline,
            known=known,
        )

    def with_config(self, config: DRTConfig, plan: Plan | None = None) -> "ResolvedPlan":
        """The same layers under other settings, which select alike."""
        return self.of(plan or self.plan, self.targets, config, lowrank=self.lowrank, budget=self.budget)


def forms_of(kind: str, rank: int | float | None, targets: TargetLayers, config: DRTConfig) -> Forms:
    """The form of every target layer in a phase of some kind and rank."""
    return Frozen({name: resolve_form(kind, shape, config, name, rank) for name, shape in targets.shapes.items()})


def _lowrank_of(plan: Plan) -> str | None:
    """What 'lowrank' stands for in a plan made by hand: the form of its first phase in low rank."""
    return next((phase.kind for phase in plan.phases if phase.kind != "dense"), None)


def _key(phase: Phase) -> tuple:
    return phase.kind, type(phase.rank), phase.rank
