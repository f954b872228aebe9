"""Which layers' inputs a truncation is to be weighed by, and in which update steps they are gathered."""

from hf_drt.forms import weighs_inputs
from hf_drt.planning.resolved import ResolvedPlan

UPDATES = 10
"""Update steps before a phase that truncates in which inputs are gathered: all of the phase before, if it has fewer."""


def gathered_at(resolved: ResolvedPlan, step: int) -> list[str]:
    """The layers whose inputs count in update ``step``: those that lose rank as the next phase begins, if that is at
    most :data:`UPDATES` away. Of full rank in turns, a turn that ends is known, whoever has the next one."""
    if resolved.config.truncation == "weight":
        return []
    plan = resolved.plan
    index = plan.index_at(step)
    if index + 1 == len(plan) or plan.end_of(index) - step > UPDATES:
        return []
    now, coming, shapes = *resolved.forms_by_phase[index : index + 2], resolved.targets.shapes
    return [name for name, shape in shapes.items() if weighs_inputs(now[name], coming[name], shape)]
