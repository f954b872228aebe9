"""A resolved plan in words: what was written, what it came to, and what decided it."""

from collections import Counter
from collections.abc import Iterator, Sequence

from hf_drt.config import DRTConfig
from hf_drt.forms import Dense
from hf_drt.planning.dtypes import dtype_facts
from hf_drt.planning.ranks import stays_dense
from hf_drt.planning.resolved import ResolvedPlan
from hf_drt.planning.update_cost import update_tokens
from hf_drt.schedule import LETTERS, LOW_RANK, Entry, Phase, Schedule, form_text, provisional, spans, timelines


def description(resolved: ResolvedPlan) -> list[str]:
    """Lines to print: the phases; what 'lowrank' stands for; ranks, boundaries and settings, each with what has decided
    it; and what the plan takes of the dense training of the target layers."""
    lines = timelines(spans(resolved.plan), marks=LETTERS).splitlines()
    return [headline(resolved), *lines, *facts(resolved)]


def _groups(resolved: ResolvedPlan) -> Iterator[str]:
    """How large the groups are, and who decides whose turn it is."""
    plan = resolved.plan
    counts = {part.group.of for phase in plan.phases for part in phase.parts if part.group is not None}
    for count in sorted(counts):
        sizes = Counter(resolved.groups(count).values()).values()
        layers = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{max(sizes)}"
        by = ", ".join(resolved.config.group_by or ["block"])
        yield f"groups: {count} of {layers} layers (group_by={by})"
    if provisional(plan) != plan:
        yield "turns: as the effective ranks of the groups have fallen; shown in ascending order"


def chosen(resolved: ResolvedPlan) -> list[str]:
    """The lines of :func:`description` that tell of ranks, with the budget where it has decided them, and of the matrix
    optimizer with its rate."""
    uses = resolved.config.uses_matrix_optimizer
    return [*_ranks(resolved), *([f"matrix_optimizer: {_rate(resolved.config)}"] if uses else [])]


def headline(resolved: ResolvedPlan) -> str:
    """What was written, and the phases that it has come to."""
    plan, layers = resolved.plan, len(resolved.targets.shapes)
    return f"dynamic-rank plan: {_written(resolved)}{plan} (of {plan.max_steps} update steps) on {layers} layers"


def facts(resolved: ResolvedPlan) -> list[str]:
    """:func:`description` without the phases."""
    lines = [*_groups(resolved), *_decided(resolved), *_ranks(resolved), *dtype_facts(resolved)]
    cost = resolved.cost
    lines.append(
        f"cost, of the target layers alone: {cost.flops:.3f} of their dense training FLOPs, {cost.parameters:.3f} of "
        "their trainable parameters"
    )
    return [*lines, *_split_cost(resolved), *_update_cost(resolved)]


def _split_cost(resolved: ResolvedPlan) -> Iterator[str]:
    """What a plan does not save whose adapters are split, and how often it splits them."""
    if not resolved.splits:
        return
    cost = resolved.cost
    forward = f"forward pass: {cost.forward:.3f} of dense"
    if any(phase.forward < 1 for phase in cost.phases):
        yield forward
    else:
        yield (
            f"{forward}, and in no phase below it, since an adapter computes its frozen base too; what follows the "
            "rank is the gradients of weights and the optimizer's state alone"
        )
    ranks = {tuple(forms.values()) for forms in resolved.forms_by_phase}
    yield f"rank levels: {len(ranks)}, by {cost.switches} switch{'es' if cost.switches != 1 else ''}"


def _update_cost(resolved: ResolvedPlan) -> Iterator[str]:
    """What the matrix optimizer takes; its share depends on the tokens of an update, which are not known here."""
    targets = resolved.targets
    if not resolved.config.uses_matrix_optimizer:
        return
    shapes, copies = list(targets.shapes.values()), list(targets.copies.values())
    tokens = {
        phase.kind if phase.parts else phase.form: update_tokens(shapes, list(forms.values()), copies)
        for phase, forms in zip(resolved.plan.phases, resolved.forms_by_phase, strict=True)
    }
    parts = ", ".join(f"{count:,.0f} / T ({form})" for form, count in tokens.items())
    rate = _rate(resolved.config)
    yield f"matrix_optimizer: {rate}, whose update of T tokens costs {parts} of the target layers' training"


def _rate(config: DRTConfig) -> str:
    """The matrix optimizer with its rate, and who has chosen it."""
    by = f" (by the preset {config.preset.name})" if config.preset and "matrix_optimizer" in config.brought else ""
    return f"{config.matrix_optimizer}{by} at matrix_lr={config.matrix_lr:g}"


def _schedule(resolved: ResolvedPlan) -> Schedule | None:
    """What the plan was made of; None where it was made by hand."""
    return resolved.config.parsed if resolved.lowrank is not None else None


def _written(resolved: ResolvedPlan) -> str:
    schedule, text = _schedule(resolved), resolved.config.schedule
    if schedule is None or str(schedule) == str(resolved.plan):
        return ""
    phases = "" if schedule.preset is None or schedule.trigger is not None else f" = {schedule}"
    return f"{text}{phases} -> "


def _decided(resolved: ResolvedPlan) -> Iterator[str]:
    schedule, config = _schedule(resolved), resolved.config
    if schedule is None:
        return
    if schedule.writes_lowrank:
        why = "by where the weights come from" if config.start == "auto" else f"start={config.start}"
        yield f"lowrank: {resolved.lowrank} form ({why})"
    for entry, phase in _written_phases(schedule, resolved.plan.phases):
        if entry.at.unit == "budget":
            yield f"boundary: {phase.kind} from step {phase.start} on (by the budget of {resolved.budget:.4g})"
    if schedule.trigger is not None:
        yield f"windows: full rank as {schedule.trigger} asks for it (within the budget of {resolved.budget:.4g})"
    if (preset := schedule.preset) is not None:
        for name, value in preset.settings_for(config, resolved.lowrank).items():
            if getattr(config, name) == value and name != "matrix_optimizer":  # which is told with its rate
                yield f"{name}: {value} (by the preset {preset.name})"


def _written_phases(schedule: Schedule, phases: Sequence[Phase]) -> Iterator[tuple[Entry, Phase]]:
    return zip(schedule.entries, phases, strict=False)  # windows of a trigger are not written


def _ranks(resolved: ResolvedPlan) -> Iterator[str]:
    """The rank of every kind of low-rank phase, and what has decided it."""
    seen = set()
    for index, phase in enumerate(resolved.plan.phases):
        forms, parts = resolved.forms_by_phase[index], resolved.parts(index)
        for kind, rank in dict.fromkeys((part.kind, part.rank) for part in phase.whole if part.kind in LOW_RANK):
            if (kind, rank) in seen:
                continue
            seen.add((kind, rank))
            named = {name: forms[name] for name, part in parts.items() if (part.kind, part.rank) == (kind, rank)}
            ranks = [form.rank for form in named.values() if not isinstance(form, Dense)]
            source = _rank_source(resolved, index, kind, rank)
            yield f"rank: {kind} {_span(ranks)} ({source})"
            if kept := sum(stays_dense(kind, name, resolved.config) for name in named):
                yield f"dense_query_key: {kept} query and key projections stay dense in {kind} phases"


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks, default=0), max(ranks, default=0)
    return f"{low} to {high}" if high > low else f"{low or 'full'}"


def _rank_source(resolved: ResolvedPlan, index: int, kind: str, rank: int | float | str | None) -> str:
    config, schedule = resolved.config, _schedule(resolved)
    pattern = "rank_pattern, else " if config.rank_pattern else ""
    if rank is None:
        return f"{pattern}rank_ratio={config.rank_ratio:g}" if config.rank is None else f"{pattern}rank={config.rank}"
    if schedule is not None and index < len(schedule.entries) and schedule.entries[index].rank == "budget":
        return f"{pattern}{rank:g} of min(out, in) by the budget of {resolved.budget:.4g}"
    return f"{pattern}{form_text(kind, rank)} in the schedule"
