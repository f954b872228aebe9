"""Dtypes of a plan's phases on a model, and what is said of them."""

from collections.abc import Iterator

import torch
from torch import nn

from hf_drt.forms import Adapter
from hf_drt.planning.resolved import ResolvedPlan
from hf_drt.schedule import AUTO, Plan


def check_weights(model: nn.Module, plan: Plan) -> None:
    """Refuse 'fp32' for a model that would not compute in it: autocast switched off widens nothing.

    Raises:
        ValueError: A phase is in fp32, and weights are in fewer bits.
    """
    phase = next((phase for phase in plan.phases if phase.dtype == "fp32"), None)
    if phase is None:
        return
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype in (torch.bfloat16, torch.float16):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"phase '{phase}' is in fp32, but {name} is in {dtype}, and would be computed with as it is. Load the "
                "model with dtype=torch.float32 (bf16 phases need no weights in bfloat16), or leave the dtype out."
            )


def dtype_facts(resolved: ResolvedPlan) -> Iterator[str]:
    """Lines on what phases compute in, and what has decided it."""
    phases, schedule = resolved.plan.phases, resolved.config.parsed
    yield from _frozen_facts(resolved)
    if all(phase.dtype is None for phase in phases):
        return
    told = ", ".join(f"{phase.dtype or 'as the run'} from step {phase.start} on" for phase in phases)
    yield f"precision: {told} (autocast; weights and optimizer stay as they are)"
    if resolved.paces is not None and schedule is not None:
        budget = f"a budget of {resolved.budget:.4g} of the seconds of dense layers in fp32"
        yield f"dtype {AUTO}: by {budget}; seconds of a multiply-add, as measured here: {resolved.paces}"


def _frozen_facts(resolved: ResolvedPlan) -> Iterator[str]:
    """In what bases are kept, and how often they are rounded."""
    kept = {
        name
        for forms in resolved.forms_by_phase
        for name, form in forms.items()
        if isinstance(form, Adapter) and form.dtype is not None
    }
    if not kept:
        return
    plan = resolved.plan
    times = sum("adapter" in p.kinds and plan.form_start(i) == p.start for i, p in enumerate(plan.phases))
    when = f"each of {times} phases begins" if times > 1 else "their phase begins"
    yield f"frozen bases: those of {len(kept)} layers in {resolved.config.frozen_dtype}, rounded as {when}"
