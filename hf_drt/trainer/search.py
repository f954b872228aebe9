"""Where a trainer's settings come from, and whether values that a hyperparameter search sets would reach them."""

import contextlib
from collections.abc import Iterator
from typing import Any

from hf_drt.config import DRTConfig
from hf_drt.trainer.arguments import PREFIX

# On a trainer: of each setting that its last trial has set, the value before, and its own.
_BEFORE = "_drt_before_trial"


def settings_of(given: DRTConfig | str | None, args: Any) -> DRTConfig:
    """``drt=``, or what the ``drt_*`` arguments are now; a schedule's text goes with the other arguments.

    Raises:
        ValueError: There are both, and they differ.
        TypeError: ``drt=`` is neither a configuration nor a text.
    """
    of_args = DRTConfig.from_prefixed(args, PREFIX)
    if given is None:
        return of_args
    if isinstance(given, str):
        if of_args.schedule not in (None, given):
            raise ValueError(
                f"drt={given!r} is the schedule, so that drt_schedule={of_args.schedule!r} of the training arguments "
                "would have no effect. Give one of the two."
            )
        return DRTConfig.from_prefixed(args, PREFIX, schedule=given)
    config = DRTConfig.of(given)
    if of_args not in (DRTConfig(), config):
        raise ValueError(
            "drt=DRTConfig(...) holds all settings, so that the drt_* settings of the training arguments "
            f"(drt_schedule={of_args.schedule!r}) would have no effect. Give one of the two."
        )
    return config


@contextlib.contextmanager
def checked_search(trainer: Any, trial: Any, on: bool, given: DRTConfig | str | None) -> Iterator[None]:
    """In the block, in which a trial's values are taken over, refuse those that would have no effect.

    Optuna's values are seen as ``hp_space`` returns them; the other backends' trial is a dict of them. A setting of
    ours that an earlier trial has set and this one does not is again what it was before; the Trainer would keep it, so
    that where one choice decides which others there are, trials would depend on their order.

    Args:
        trainer: Whose arguments are set.
        trial: Of the search, or None.
        on: Whether the trainer trains in dynamic rank.
        given: ``drt=``, or what ``hf_drt.run`` was given.
    """
    if isinstance(trial, dict):
        _check_names(trial, trainer.args, on, given)
        _begin_anew(trainer, trial)
    space: Any = getattr(trainer, "hp_space", None)

    def checked_space(trial: Any) -> dict[str, Any]:
        values = space(trial)
        _check_names(values, trainer.args, on, given)
        _begin_anew(trainer, values)
        return values

    trainer.hp_space = checked_space if trial is not None and space is not None else space
    try:
        yield
    except Exception:  # a trial that cannot begin leaves our settings as they were before it
        for name, (own, _) in getattr(trainer, _BEFORE, {}).items():
            setattr(trainer.args, name, own)
        setattr(trainer, _BEFORE, {})
        raise
    finally:
        trainer.hp_space = space


def _begin_anew(trainer: Any, values: dict[str, Any]) -> None:
    """Take back what earlier trials have set, unless it has been changed since; what this one sets is taken as it is,
    where the Trainer casts it to the type of the value before (None becomes 'None')."""
    for name, (own, searched) in getattr(trainer, _BEFORE, {}).items():
        if getattr(trainer.args, name) == searched:
            setattr(trainer.args, name, own)
    ours = [name for name in values if name.startswith(PREFIX)]
    setattr(trainer, _BEFORE, {name: (getattr(trainer.args, name), values[name]) for name in ours})
    for name in ours:
        setattr(trainer.args, name, None)


def _check_names(values: dict[str, Any], args: Any, on: bool, given: DRTConfig | str | None) -> None:
    for name in (name for name in values if name.startswith(PREFIX)):
        if not hasattr(args, name):
            reason = f"{type(args).__name__} has no such field. Use DRTTrainingArguments, and a name of its fields."
        elif not on:
            reason = (
                "the trainer was made without a schedule, and trains plainly. Set drt_schedule in its training "
                "arguments; a search may change it from there."
            )
        elif isinstance(given, DRTConfig) or (given is not None and name == f"{PREFIX}schedule"):
            reason = "the trainer takes it from drt=, or from hf_drt.run. Leave that out, and set drt_* arguments."
        else:
            continue
        raise ValueError(f"a search over {name} would have no effect: {reason}")
