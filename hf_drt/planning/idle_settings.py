"""Settings that would have no effect, by what would use them: each is refused before a run, never passed over.

:data:`IDLE` has a row for every field of :class:`hf_drt.DRTConfig`. A setting counts as set if it differs from its
default.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations, pairwise
from typing import Any

from hf_drt.config import DRTConfig
from hf_drt.forms import PRODUCTS, product_for
from hf_drt.planning.layers import Shapes
from hf_drt.planning.ranks import stays_dense
from hf_drt.planning.resolved import ResolvedPlan
from hf_drt.schedule import LOW_RANK, Entry, Phase, Schedule, form_text, recasts

Rank = int | float | str | None


@dataclass(frozen=True)
class Usage:
    """What decides whether a setting has an effect.

    Attributes:
        config: All settings, settled.
        schedule: Of ``config.schedule``; None where a plan was made by hand.
        phases: Kind and rank of every phase, and of every part of a mixed one; kind 'lowrank' is resolved, a rank
            'budget' may not be.
        targets: Shape of every target layer, by name.
        grows: Whether a trigger adds phases during the run.
        in_trainer: Whether a Trainer drives the run, and evaluates, saves and logs in it.
        grouped: Whether a phase is of groups of layers.
        recasts: Whether all phases after the first differ in their dtypes alone.
    """

    config: DRTConfig
    schedule: Schedule | None
    phases: Sequence[tuple[str, Rank]]
    targets: Shapes
    grows: bool
    in_trainer: bool
    grouped: bool = False
    recasts: bool = False

    @property
    def low_rank(self) -> list[Rank]:
        """The ranks of all low-rank phases."""
        return [rank for kind, rank in self.phases if kind in LOW_RANK]

    @property
    def switches(self) -> bool:
        """Whether a change of phase may happen after the first one."""
        return self.grows or len(self.phases) > 1

    @property
    def changes_form(self) -> bool:
        """Whether a layer may change form after the first phase has begun."""
        return self.grows or (self.switches and not self.recasts)

    @property
    def asks_for_rank(self) -> bool:
        """Whether ``rank`` or ``rank_ratio`` decides the rank of any layer in any phase."""
        return None in self.low_rank and any(not self._has_pattern(name) for name in self.targets)

    def _has_pattern(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.config.patterns)


def usage_of(config: DRTConfig, lowrank: str, targets: Shapes) -> Usage:
    """In a Trainer, of a schedule that is not resolved yet; ``lowrank`` is what 'lowrank' stands for."""
    config = config.settled(lowrank)
    schedule = config.parsed
    entries = schedule.entries if schedule is not None else ()
    parts = [part for entry in entries for part in entry.whole]
    phases = [(lowrank if part.kind == "lowrank" else part.kind, part.rank) for part in parts]
    grows = schedule is not None and schedule.trigger is not None
    grouped = any(part.group is not None for part in parts)
    return Usage(config, schedule, phases, targets, grows, True, grouped, _all_recast(entries))


def usage_of_plan(resolved: ResolvedPlan, in_trainer: bool) -> Usage:
    """Of a resolved plan; ``config.schedule``, if there is one, is what it was made of."""
    config, parts = resolved.config, [part for phase in resolved.plan.phases for part in phase.whole]
    phases, grows = [(part.kind, part.rank) for part in parts], resolved.trigger is not None
    grouped = any(part.group is not None for part in parts)
    recast = _all_recast(resolved.plan.phases)
    return Usage(config, config.parsed, phases, resolved.targets.shapes, grows, in_trainer, grouped, recast)


def _all_recast(phases: Sequence[Entry] | Sequence[Phase]) -> bool:
    return all(recasts(before, after) for before, after in pairwise(phases))


def refuse_without_schedule(config: DRTConfig) -> None:
    """Refuse settings of dynamic-rank training that is off.

    Raises:
        ValueError: A setting is set, but no schedule.
    """
    if config.schedule is None and (given := settings_given(config)):
        raise ValueError(
            f"{_listed(config, given)}, but there is no schedule: dynamic-rank training is off, and the run would be "
            f"plain training. Set schedule (drt_schedule), e.g. 'paper', or leave {' and '.join(given)} out."
        )


def refuse_idle(usage: Usage) -> None:
    """Refuse the first setting that would have no effect.

    Raises:
        ValueError: The message says what would use it.
    """
    for name, reason in idle_settings(usage):
        phases = " ".join(form_text(kind, rank) for kind, rank in usage.phases)
        raise ValueError(
            f"{name} is {getattr(usage.config, name)!r}, and would have no effect: {reason} Or leave {name} out. "
            f"(The phases are {phases}.)"
        )


def idle_settings(usage: Usage) -> Iterator[tuple[str, str]]:
    """Settings that would have no effect, each with the reason and what would use it."""
    for name in settings_given(usage.config):
        if (reason := IDLE[name](usage)) is not None:
            yield name, reason


def settings_given(config: DRTConfig) -> list[str]:
    """The fields, but for the schedule, whose value would be another if they were left out; of settings that are not
    settled, with nothing of what the preset brings by what 'lowrank' stands for."""
    config = config.settled(config.lowrank)
    values: dict[str, Any] = {f.name: getattr(config.given, f.name) for f in fields(config)}
    defaults: dict[str, Any] = {f.name: f.default for f in fields(config) if f.name != "schedule"}
    left_out = {name: DRTConfig(**{**values, name: value}).settled(config.lowrank) for name, value in defaults.items()}
    given = [name for name, other in left_out.items() if _value(config, name) != _value(other, name)]
    # 16 may stand in a configuration that was another schedule's before.
    return [name for name in given if name != "adapter_alpha" or config.adapter_alpha != DRTConfig().adapter_alpha]


def _value(config: DRTConfig, name: str) -> Any:
    """A setting's value; an empty list or dict says as much as None, and True or False may say what holds anyway."""
    value = config.keeps_query_key if name == "dense_query_key" else getattr(config, name)
    return None if value in ([], (), {}) else value


def _listed(config: DRTConfig, names: Sequence[str]) -> str:
    return ", ".join(f"{name} is {getattr(config, name)!r}" for name in names)


# ---- the table: why a setting has no effect, and what would use it; None where it has one

Reason = Callable[[Usage], str | None]


def _always(usage: Usage) -> None:
    return None


def _needs_phase(kind: str) -> Reason:
    def reason(usage: Usage) -> str | None:
        if any(phase == kind for phase, _ in usage.phases):
            return None
        return f"only {kind} phases use it, and there is none. Write one into the schedule, e.g. {kind}@80%."

    return reason


def _needs_low_rank(usage: Usage) -> str | None:
    if usage.low_rank:
        return None
    return "only low-rank phases use it, and all are dense. Write one into the schedule, e.g. lowrank@0."


def _rank(usage: Usage) -> str | None:
    if usage.asks_for_rank:
        return None
    if reason := _needs_low_rank(usage):
        return reason
    if None in usage.low_rank:
        return "rank_pattern gives every target layer its rank. Take layers out of rank_pattern."
    return (
        "every low-rank phase has a rank of its own, in the schedule or by the budget. Write a phase without one, e.g. "
        "lowrank@0."
    )


def _rank_ratio(usage: Usage) -> str | None:
    if usage.config.rank is None:
        return _rank(usage)
    return f"rank={usage.config.rank} takes its place. Give one of the two."


def _rank_multiple(usage: Usage) -> str | None:
    by_setting = usage.asks_for_rank and usage.config.rank is None
    shares = [*usage.low_rank, *usage.config.patterns.values()]
    if by_setting or (usage.low_rank and any(isinstance(rank, (float, str)) for rank in shares)):
        return None
    return _needs_low_rank(usage) or (
        "it rounds ranks that are given as shares, and all are absolute. Give a share, e.g. rank_ratio=0.25."
    )


def _decomposition(usage: Usage) -> str | None:
    product = PRODUCTS[usage.config.decomposition]
    if any(map(product.suits, usage.targets.values())):
        return _needs_low_rank(usage)
    return (
        f"none of the {len(usage.targets)} target layers is {product.fits_only}, and other layers take "
        f"'{DRTConfig.decomposition}' whatever it is. Include such layers, or leave it out."
    )


def _truncation(usage: Usage) -> str | None:
    if reason := _needs_phase("factored")(usage):
        return reason
    shapes = usage.targets.values()
    if not any(s.experts is None and product_for(usage.config.decomposition, s).weighs_inputs for s in shapes):
        return (
            f"none of the {len(usage.targets)} target layers is one of a single matrix in the decomposition 'svd', of "
            "which alone it is. Include such layers."
        )
    if usage.grows or any(_falls(before, after) for before, after in combinations(usage.phases, 2)):
        return None
    return "no layer loses rank after the first phase. Write a factored phase after another, e.g. dense@0 factored@40%."


def _falls(before: tuple[str, Rank], after: tuple[str, Rank]) -> bool:
    """Whether a layer may lose rank between two phases, of which the first comes first."""
    (kind, rank), (then, later) = before, after
    if then != "factored" or before == after:
        return False
    if kind != "factored" or isinstance(rank, str) or isinstance(later, str) or rank is None or later is None:
        return True
    return type(rank) is not type(later) or rank > later


def _budget(usage: Usage) -> str | None:
    if usage.grows or (usage.schedule is not None and usage.schedule.uses_budget):
        return None
    return (
        "neither a rank nor a boundary of the schedule depends on a budget. Use the preset auto, auto_late or "
        "adaptive, or write a boundary @budget, e.g. 'factored@0 dense@budget'."
    )


def _dense_query_key(usage: Usage) -> str | None:
    if reason := _needs_phase("factored")(usage):
        return reason
    keeping = replace(usage.config, dense_query_key=True)
    if any(stays_dense("factored", name, keeping) for name in usage.targets):
        return None
    return (
        f"none of the {len(usage.targets)} target layers is a query or key projection to which rank_pattern gives no "
        "rank. Include such layers."
    )


def _start(usage: Usage) -> str | None:
    if usage.schedule is not None and usage.schedule.writes_lowrank:
        return None
    return "it says what 'lowrank' stands for, which the schedule does not contain. Write lowrank in it."


def _needs_switch(usage: Usage) -> str | None:
    if usage.switches:
        return None
    return "it is for switches, and one phase lasts to the end. Write a further phase, e.g. dense@80%."


def _needs_change(usage: Usage) -> str | None:
    if usage.changes_form:
        return None
    return _needs_switch(usage) or (
        "it is for changes of form, and the phases differ in their dtypes alone, which leaves optimizer and learning "
        "rate as they are. Write a phase of another form, e.g. dense@80%."
    )


def _needs_groups(usage: Usage) -> str | None:
    if usage.grouped:
        return None
    return "the schedule has no groups. Use the preset rotate, or write some, e.g. dense[1/8]@70%."


def _frozen_dtype(usage: Usage) -> str | None:
    if all(phase not in ("frozen", "adapter") for phase, _ in usage.phases):
        return (
            "only frozen and adapter phases keep weights frozen, and there is none. Write one into the schedule, e.g. "
            "adapter@80%."
        )
    if any(not shape.kernel and not shape.experts for shape in usage.targets.values()):
        return None
    return (
        f"none of the {len(usage.targets)} target layers is a linear one, and frozen convolutions and experts, and the "
        "bases of theirs, are kept as they are. Include linear layers."
    )


def _rewarmup_start(usage: Usage) -> str | None:
    return None if usage.config.rewarmup_steps else "there is no re-warm-up. Set rewarmup_steps."


def _needs_trainer(usage: Usage) -> str | None:
    if usage.in_trainer:
        return None
    return "DRTTrainer uses it; a training loop of your own evaluates, saves and logs by itself."


def _dense_memory(usage: Usage) -> str | None:
    if not usage.in_trainer:
        return "DRTTrainer uses it; a training loop of your own makes its forward and backward passes by itself."
    return None if usage.grows else _needs_phase("dense")(usage)


def _recompute(usage: Usage) -> str | None:
    if not usage.in_trainer:
        return "DRTTrainer uses it; a training loop of your own says by itself what a forward pass keeps."
    return _needs_phase("factored")(usage)


def _adapter_alpha(usage: Usage) -> str | None:
    if usage.config.adapter_init != "split":
        return None
    return (
        "adapters of adapter_init=split are not scaled, since their rank changes. For a higher learning rate of theirs "
        "set adapter_lr_scale."
    )


def _needs_matrix_optimizer(usage: Usage) -> str | None:
    if usage.config.uses_matrix_optimizer:
        return None
    return "the run's own optimizer trains all weights. Set matrix_optimizer, e.g. to 'muon'."


def _frobenius_decay(usage: Usage) -> str | None:
    if not usage.config.uses_matrix_optimizer:
        return None
    return (
        f"matrix_optimizer={usage.config.matrix_optimizer} decays the product anyway. Give one of the two."
        f"{usage.config.without_matrix_optimizer}"
    )


def _side_lr_scale(usage: Usage) -> str | None:
    if not usage.config.uses_matrix_optimizer:
        return None
    return (
        f"matrix_optimizer={usage.config.matrix_optimizer} moves both factors by one rate, so that each makes half of "
        f"the change that it bounds. Give one of the two.{usage.config.without_matrix_optimizer}"
    )


def _log_rank_per_layer(usage: Usage) -> str | None:
    return None if usage.config.log_rank_steps else "effective ranks are not logged. Set log_rank_steps."


def _first(*reasons: Reason) -> Reason:
    return lambda usage: next((reason for idle in reasons if (reason := idle(usage)) is not None), None)


IDLE: dict[str, Reason] = {
    "schedule": _always,
    "rank_ratio": _rank_ratio,
    "rank": _rank,
    "rank_pattern": _needs_low_rank,
    "decomposition": _decomposition,
    "truncation": _truncation,
    "rank_multiple": _rank_multiple,
    "include": _always,  # ranks are logged, and costs counted, of the selected layers in dense phases too
    "exclude": _always,
    "blocks": _always,
    "ignore_source": _always,  # the selection itself refuses a pattern that overrides nothing
    "budget": _budget,
    "dense_query_key": _dense_query_key,
    "group_by": _needs_groups,
    "frozen_dtype": _frozen_dtype,
    "dense_checkpointing": _dense_memory,
    "dense_accumulation": _dense_memory,
    "recompute": _recompute,
    "start": _start,
    "adapter_alpha": _first(_needs_phase("adapter"), _adapter_alpha),
    "adapter_init": _needs_phase("adapter"),
    "moments": _needs_change,
    "rewarmup_steps": _needs_change,
    "rewarmup_start": _rewarmup_start,
    "factored_lr_scale": _needs_phase("factored"),
    "adapter_lr_scale": _needs_phase("adapter"),
    "left_lr_scale": _first(_needs_low_rank, _side_lr_scale),
    "right_lr_scale": _first(_needs_low_rank, _side_lr_scale),
    "matrix_optimizer": _always,  # dense weights too
    "matrix_lr": _needs_matrix_optimizer,
    "matrix_momentum": _needs_matrix_optimizer,
    "frobenius_decay": _first(_needs_phase("factored"), _frobenius_decay),
    "log_rank_steps": _needs_trainer,
    "log_rank_per_layer": _first(_needs_trainer, _log_rank_per_layer),
    "evaluate_at_switch": _first(_needs_trainer, _needs_switch),
    "save_at_switch": _first(_needs_trainer, _needs_switch),
    "export": _needs_trainer,
    "tag_phases": _needs_trainer,  # tags the end of the last phase too
    "seed": _always,
}
