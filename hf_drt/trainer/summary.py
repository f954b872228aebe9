"""What a run did, read from its controller and its log: the facts behind a model card."""

from typing import Any

from hf_drt.controller import DynamicRank
from hf_drt.export import PhaseSummary, RunSummary
from hf_drt.forms import Dense


def run_summary(controller: DynamicRank, history: list[dict[str, Any]], export: str, repository: str) -> RunSummary:
    """The run so far.

    Args:
        controller: Of the run.
        history: ``trainer.state.log_history``.
        export: Form in which the model is published.
        repository: Where.
    """
    plan, cost = controller.plan, controller.cost()
    rows: list[dict[str, Any]] = [{} for _ in plan.phases]
    for entry in history:
        # A row of step k stands at the end of the first k updates: the phase of update k - 1, but for a switch.
        index = entry.get("drt_phase", plan.index_at(max(entry["step"] - 1, 0)))
        rows[index] |= {key: value for key, value in entry.items() if key.startswith("drt_")}
    phases = []
    for index, (phase, row) in enumerate(zip(plan.phases, rows, strict=True)):
        ranks = [form.rank for form in controller.forms(index).values() if not isinstance(form, Dense)]
        phases.append(
            PhaseSummary(
                kind=phase.kind,
                form=phase.name if phase.name != phase.kind else None,
                start=phase.start,
                end=plan.end_of(index),
                ranks=(min(ranks), max(ranks)) if ranks else None,
                flops=cost.phases[index].flops,
                trainable=row.get("drt_trainable_parameters"),
                seconds=row.get("drt_phase_seconds"),
                effective_rank=row.get("drt_effective_rank_mean"),
            )
        )
    config = controller.config
    return RunSummary(
        phases=tuple(phases),
        layers=len(controller.targets),
        flops=cost.flops,
        parameters=cost.parameters,
        schedule=config.schedule or str(controller.initial.plan),
        settings=config.changed(),
        export=export,
        repository=repository,
        model_class=type(controller.model).__name__,
        plan=plan,
    )
