"""The structure of a model in the middle of a plan, as JSON, and its comparison with a run that wants to go on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hf_drt.forms import Form, LayerShape, form_from_dict, form_to_dict
from hf_drt.messages import some
from hf_drt.schedule import Plan, Run, Schedule, could_become

# Settings that a resumed run must share with the one that wrote the checkpoint: they decide structure, parameter groups
# and the numbers of later phases.
LASTING = (
    "rank_ratio",
    "rank",
    "rank_pattern",
    "rank_multiple",
    "decomposition",
    "truncation",
    "adapter_alpha",
    "adapter_init",
    "moments",
    "factored_lr_scale",
    "adapter_lr_scale",
    "left_lr_scale",
    "right_lr_scale",
    "frobenius_decay",
    "matrix_optimizer",
    "matrix_lr",
    "matrix_momentum",
    "dense_query_key",
    "group_by",
    "frozen_dtype",
)
# Settings that are left out at this value, which was the default when they came: states from before lack them.
_UNSAID = {
    "decomposition": "svd",
    "truncation": "weight",
    "left_lr_scale": 1.0,
    "right_lr_scale": 1.0,
    "matrix_optimizer": "none",
    "matrix_lr": 0.04,
    "matrix_momentum": 0.95,
    "group_by": None,
    "frozen_dtype": None,
}
_MEANT = {"group_by": ["block"]}  # by None
_OF_MATRICES = ("matrix_lr", "matrix_momentum")
MADE_IN = "optimizer_made_in"
_SAME_RUN = "Resume with the model and the drt settings of the run that wrote it."
_KEYS = {"plan": str, "max_steps": int, "phase": object, "settings": dict, "layers": dict}

Shapes = dict[str, LayerShape]


def lasting(config: Any) -> dict[str, Any]:
    """The settings of a configuration that a state keeps: those of :data:`LASTING` that have an effect."""
    left_out = () if config.uses_matrix_optimizer else _OF_MATRICES
    values = {name: getattr(config, name) for name in LASTING if name not in left_out}
    return {name: None if value is not None and value == _MEANT.get(name) else value for name, value in values.items()}


def structure(
    plan: Plan,
    phase: int | None,
    settings: dict[str, Any],
    targets: Shapes,
    forms: dict[str, Form],
    made_in: int | None = 0,
) -> dict[str, Any]:
    """The structure as JSON: plan, phase, lasting settings, and ``(out, in)`` and form of every target layer; and the
    phase in which the optimizer was made (None: before the first), where it is not the first."""
    layers = {name: {"shape": list(shape), **form_to_dict(forms[name])} for name, shape in targets.items()}
    settings = {name: value for name, value in settings.items() if _UNSAID.get(name) != value or value is None}
    state = {"plan": str(plan), "max_steps": plan.max_steps, "phase": phase, "settings": settings, "layers": layers}
    return state if made_in == 0 else state | {MADE_IN: made_in}


def stored_plan(state: dict[str, Any]) -> Plan | None:
    """The plan of a state, or None where it cannot be read."""
    try:
        return Schedule.parse(state["plan"]).resolve(Run(state["max_steps"]))
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def continued_plan(
    state: dict[str, Any], initial: Plan, *, grows: bool, turns: bool, outline: bool, measured: bool
) -> Plan | None:
    """The plan of a state that a run with the plan ``initial`` may go on with; None where it is another.

    Args:
        state: Of :func:`structure`.
        initial: As the run began.
        grows: Whether a trigger adds windows to it: any plan that has grown out of it will do.
        turns: Whether the run decides on turns: any plan that a run has decided will do.
        outline: Whether it is an outline: any plan with its phases will do.
        measured: Whether ranks and dtypes follow from seconds that were measured: any plan that was measured will do.
    """
    plan = stored_plan(state)
    if plan is None or plan.max_steps != initial.max_steps:
        return None
    grown = grows and plan.phases[0] == initial.phases[0]
    alike = [replace(p, start=0) for p in plan.phases] == [replace(p, start=0) for p in initial.phases]
    decided = not turns or "turns" in state
    timed = measured and "paces" in state and [p.kind for p in plan.phases] == [p.kind for p in initial.phases]
    return plan if grown or timed or (outline and alike) or (decided and could_become(initial, plan)) else None


def check_preset(state: dict[str, Any], schedule: Schedule | None, lowrank: str | None) -> None:
    """Whether a state is of the preset that a run's preset names as the one to take instead: an earlier version may
    have meant that one by the same name.

    Args:
        state: Of :func:`structure`; one that cannot be read is left to :func:`check_structure`.
        schedule: Of this run, where 'lowrank' stands for ``lowrank``; None without one.

    Raises:
        ValueError: It has the phases of that one, and not of this run's schedule.
    """
    preset = schedule.preset if schedule is not None else None
    plan = stored_plan(state)
    if schedule is None or preset is None or preset.instead is None or plan is None or lowrank is None:
        return
    kinds = [phase.kind for phase in plan.phases]
    if kinds != schedule.kinds(lowrank) and kinds == Schedule.parse(preset.instead).kinds(lowrank):
        raise ValueError(
            f"the state is of the plan '{plan}', whose forms are those of the preset {preset.instead}, not of "
            f"{preset.name}. If an earlier version wrote it by the name of {preset.name}, resume with "
            f"schedule='{preset.instead}'; if not, with schedule='{plan}'; and with the other settings as they were."
        )


def check_structure(
    state: dict[str, Any],
    plan: Plan,
    settings: dict[str, Any],
    targets: Shapes,
    forms: Callable[[int], dict[str, Form]],
) -> None:
    """Compare a stored structure with a run's.

    Args:
        state: From :func:`structure`, by way of a file.
        plan, settings, targets: Of this run.
        forms: Gives the forms that this run wants in a phase, by layer.

    Raises:
        ValueError: The state is damaged, or of another plan, setting, model or selection; the difference is named.
    """
    for key, kind in _KEYS.items():
        if key not in state:
            raise ValueError(f"the state lacks '{key}'; it is incomplete.")
        if not isinstance(state[key], kind):
            raise ValueError(f"the state's '{key}' must be of type {kind.__name__}, got {state[key]!r}; it is damaged.")
    check_plan(state["plan"], state["max_steps"], plan)
    if not (isinstance(state["phase"], int) and 0 <= state["phase"] < len(plan)):
        raise ValueError(
            f"phase must lie in 0..{len(plan) - 1}, the state has {state['phase']!r}. (None: it was taken before "
            "apply(0), and describes no phase.)"
        )
    made_in = state.get(MADE_IN, 0)
    if made_in is not None and not (isinstance(made_in, int) and 0 <= made_in < len(plan)):
        raise ValueError(
            f"the state's '{MADE_IN}' must be a phase in 0..{len(plan) - 1}, or null, got {made_in!r}; it is damaged."
        )
    for name, value in settings.items():
        if (stored := state["settings"].get(name, _UNSAID.get(name))) != value:
            unsaid = name in _UNSAID and name not in state["settings"]
            then = f" The state does not name it, and had the default of then: set {name}={stored!r}." if unsaid else ""
            raise ValueError(f"{name} is {value!r} here, and {stored!r} in the state. {_SAME_RUN}{then}")
    _check_layers(state["layers"], targets, forms(state["phase"]), state["phase"])


def check_plan(stored: str, max_steps: int, plan: Plan) -> None:
    """Compare a stored plan, and its length, with a run's.

    Raises:
        ValueError: They differ.
    """
    if (stored, max_steps) != (str(plan), plan.max_steps):
        raise ValueError(
            f"the plan has changed: the state is of '{stored}' over {max_steps} update steps, this run of '{plan}' "
            f"over {plan.max_steps}. Go on with the schedule and length of then: schedule='{stored}', "
            f"max_steps={max_steps}. To train for longer, finish that run, and start a new one with its own schedule "
            "from the saved model."
        )


def _check_layers(layers: dict[str, Any], targets: Shapes, expected: dict[str, Form], phase: int) -> None:
    if missing := sorted(set(targets) - set(layers)):
        raise ValueError(f"the state lacks {some(missing)}, which this run selects. {_SAME_RUN}")
    if extra := sorted(set(layers) - set(targets)):
        raise ValueError(f"the state holds {some(extra)}, which this run does not select. {_SAME_RUN}")
    for name, entry in layers.items():
        if not (isinstance(entry, dict) and isinstance(entry.get("shape"), list)):
            raise ValueError(f"the state's entry of {name} is {entry!r}, which gives no form and shape.")
        form = {key: value for key, value in entry.items() if key != "shape"}
        if (shape := tuple(entry["shape"])) != targets[name]:
            raise ValueError(f"{name} has shape {targets[name]} here, and {shape} in the state. {_SAME_RUN}")
        if form_from_dict(form) != expected[name]:
            raise ValueError(
                f"{name} is {form_from_dict(form)} in the state, but this run's settings make it {expected[name]} in "
                f"phase {phase}. {_SAME_RUN}"
            )
