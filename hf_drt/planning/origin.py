"""Are a model's weights pretrained, or drawn at random? Truncation to factors would destroy pretrained ones."""

import logging
import weakref

from torch import nn

from hf_drt.config import DRTConfig
from hf_drt.forms import AdapterLinear, FactoredLinear
from hf_drt.planning.evidence import evidence_of_training
from hf_drt.schedule import Schedule

logger = logging.getLogger(__name__)


def is_pretrained(model: nn.Module) -> bool:
    """True if weights of the model came out of ``from_pretrained``, which marks the parameters that it loads, or if
    layers are in adapter form: those stand on weights that have been trained.

    ``config.name_or_path`` does not tell: ``from_config`` on a downloaded configuration sets it too. A deep copy and
    ``load_state_dict`` lose the mark.
    """
    marked = any(getattr(p, "_is_hf_initialized", False) for p in model.parameters())
    return marked or any(isinstance(module, AdapterLinear) for module in model.modules())


def lowrank_kind(schedule: Schedule, config: DRTConfig, model: nn.Module, resumed: bool = False) -> str:
    """What 'lowrank' stands for: 'adapter' for a pretrained model, 'factored' for a new one.

    With start='auto' the mark of ``from_pretrained`` decides. Without it a model is new, unless its normalisation
    layers have been trained (:mod:`hf_drt.planning.evidence`).

    Args:
        schedule: Of the settings.
        config: All settings.
        model: Whose weights are looked at.
        resumed: Whether a run goes on, so that the forms of the model are its own and say nothing of its beginning.

    Raises:
        ValueError: The schedule has 'lowrank', start is 'auto', and weights without a mark have been trained.
    """
    if config.start != "auto":
        return "adapter" if config.start == "pretrained" else "factored"
    decided = _DECIDED.get(_bare(model))
    if resumed and decided is not None:
        return decided
    if is_pretrained(model):
        return "adapter"
    if decided is not None:
        return decided
    if schedule.writes_lowrank and (sign := evidence_of_training(model).sign) is not None:
        raise ValueError(
            f"'lowrank' in the schedule '{schedule}' stands for factored form in a new model, and for adapter form in "
            "a pretrained one, whose weights a truncation would destroy. No weight bears the mark of from_pretrained, "
            f"but the model has been trained: {sign}. Set start='pretrained' (drt_start) to keep what it has learned, "
            "or start='scratch' to truncate its weights."
        )
    return "factored"


# Weakly by model, so that a second run on it is not taken for a model that came trained.
_DECIDED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def _bare(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # of torch.compile


def decide(lowrank: str, schedule: Schedule, config: DRTConfig, model: nn.Module, resumed: bool) -> None:
    """Put in force what 'lowrank' stands for in a run that is about to begin, and warn where that may be wrong.

    It is remembered: the model's own training is no sign that it began with trained weights. Arguments as in
    :func:`lowrank_kind`.
    """
    if schedule.writes_lowrank:
        if not resumed:
            _report(lowrank, config, model)
        _DECIDED[_bare(model)] = lowrank
    factored = next((entry for entry in schedule.entries if any(p.kind == "factored" for p in entry.whole)), None)
    if lowrank == "adapter" and factored is not None and not _in_factors(model):
        logger.warning(
            "phase '%s' truncates pretrained weights, which usually destroys them; adapter form keeps them.",
            factored,
        )


def _in_factors(model: nn.Module) -> bool:
    return any(isinstance(module, FactoredLinear) for module in model.modules())


def _warn_of_own_training(model: nn.Module) -> None:
    """A further run on a model that an earlier one has trained, and left dense, begins by truncating it."""
    if not _in_factors(model) and (sign := evidence_of_training(model).sign) is not None:
        logger.warning(
            "'lowrank' is taken as factored form, as in the run before on this model, which has trained it since "
            "(%s): its weights are truncated. Set start='pretrained' to go on from them in adapters.",
            sign,
        )


def _report(lowrank: str, config: DRTConfig, model: nn.Module) -> None:
    """Say in the log that a model has been taken for a new one, and how sure that is."""
    if config.start != "auto" or lowrank != "factored":
        return
    if _bare(model) in _DECIDED:
        _warn_of_own_training(model)
        return
    if origin := getattr(getattr(model, "config", None), "name_or_path", ""):
        logger.warning(
            "'lowrank' is taken as factored form, since no weight bears the mark of from_pretrained, but the model's "
            "configuration is that of '%s'. If the weights are pretrained (a copy, or load_state_dict), set "
            "start='pretrained': truncation would destroy them.",
            origin,
        )
    elif evidence_of_training(model).looked == 0:
        logger.warning(
            "'lowrank' is taken as factored form, for a new model: no weight bears the mark of from_pretrained, and "
            "there is no normalisation layer that would show training. If the weights have been trained, set "
            "start='pretrained': truncation would destroy them."
        )
    else:
        logger.info("'lowrank' is taken as factored form: the weights are new. Set start='pretrained' if they are not.")
