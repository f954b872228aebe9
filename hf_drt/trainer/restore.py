"""Structure and optimizer together, as a run has them: at its beginning, and in a checkpoint. What fails here is taken
back by :func:`hf_drt.trainer.undo.as_it_was_on_failure`.

Parameter groups are a user's own affair. They may go by names, shapes or ``requires_grad``, which differ from phase to
phase, while a switch keeps a layer's weights in the group in which they were. So a checkpoint's groups are those of the
phase in which the optimizer was made, spliced phase by phase; an optimizer made over the checkpoint's own structure
need not have them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from hf_drt.checkpoint import MADE_IN, read_inputs
from hf_drt.controller import DynamicRank
from hf_drt.trainer.checkpoint import check_optimizer
from hf_drt.trainer.optimizers import picks_layers
from hf_drt.transition import Transition

_PARAMETERS = ("params", "model", "optimizer_dict")  # what Trainer takes in place of its own parameter groups


def begin(trainer: Any, controller: DynamicRank) -> Transition:
    """Bring the model into the phase of the present step, with the optimizer if there is one.

    One that finds its parameters in ``optimizer_cls_and_kwargs``, or is made for dense layers, is made before the first
    phase, whose new weights then take the place of those.
    """
    with _parameters_put_back(trainer):
        made = trainer.optimizer is None and (_brings_parameters(trainer) or picks_layers(trainer))
        if made:
            trainer.create_optimizer()
        transition = controller.apply(trainer.state.global_step, trainer.optimizer)
    trainer._drt_made = trainer.optimizer if made else None
    return transition


def restore(trainer: Any, controller: DynamicRank, state: dict[str, Any], folder: str, *, compare: bool = True) -> None:
    """The structure of a checkpoint, an optimizer over it, and what was gathered of layers' inputs.

    Args:
        state: The structure state in ``folder``.
        compare: Whether to look if the optimizer's state in ``folder`` fits; not under FSDP, which has its own files.
    """
    with _parameters_put_back(trainer):
        if not _brings_parameters(trainer) and (made_in := state.get(MADE_IN, 0)) is not None:
            controller.empty_phase(min(made_in, state["phase"]), trainer.optimizer)
        trainer.create_optimizer()
        controller.load_state_dict(state, trainer.optimizer)
        controller.inputs.load_state_dict(read_inputs(folder) if state.get("inputs") else {})
        if compare:
            check_optimizer(folder, trainer.optimizer)
    trainer._drt_made = trainer.optimizer


@contextlib.contextmanager
def optimizer_made(trainer: Any) -> Iterator[None]:
    """In the block ``create_optimizer`` leaves it at the optimizer that :func:`begin` or :func:`restore` has made: an
    override need not look whether there is one, and would make another over the structure of now."""
    made, trainer._drt_made = trainer._drt_made, None
    if made is None or trainer.optimizer is not made:
        yield
        return
    kept = vars(trainer).get("create_optimizer")
    trainer.create_optimizer = lambda *args, **kwargs: made
    try:
        yield
    finally:
        if kept is None:
            del trainer.create_optimizer
        else:
            trainer.create_optimizer = kept


@contextlib.contextmanager
def _parameters_put_back(trainer: Any) -> Iterator[None]:
    """After an exception ``optimizer_cls_and_kwargs`` has the parameters again, which the Trainer takes out of it."""
    settings = _settings(trainer)
    parameters = {key: settings[key] for key in _PARAMETERS if key in settings}
    try:
        yield
    except Exception:
        settings.update(parameters)
        raise


def _brings_parameters(trainer: Any) -> bool:
    return any(key in _settings(trainer) for key in _PARAMETERS)


def _settings(trainer: Any) -> dict[str, Any]:
    given = trainer.optimizer_cls_and_kwargs
    return given[1] if given is not None else {}
