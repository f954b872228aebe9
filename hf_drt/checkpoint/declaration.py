"""What ``config.json`` says of a model's low-rank layers, so that ``save_pretrained`` writes what loads as it was.

:class:`hf_drt.DynamicRank` keeps it up to date. transformers' objects are recognised by their class' name, so that
nothing here imports it.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_drt.engines import unwrapped
from hf_drt.forms import LowRankLinear, form_to_dict, weight_shape
from hf_drt.native_format import METHOD

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
_KEPT = "_drt_weight_conversions"
_OWN = "_drt_own_config"
_MODEL = "transformers.modeling_utils.PreTrainedModel"


def declaration(model: nn.Module) -> dict[str, Any] | None:
    """The low-rank layers as the JSON block ``quantization_config``; None if there are none.

    Names are those of the model at run time; ``shape`` is ``(out, in)``.
    """
    layers = {
        name: {"shape": list(weight_shape(module)), **form_to_dict(module.form)}
        for name, module in model.named_modules()
        if isinstance(module, LowRankLinear)
    }
    return {"quant_method": METHOD, "format_version": FORMAT_VERSION, "layers": layers} if layers else None


def declare(model: nn.Module) -> None:
    """Bring ``model.config`` in line with the forms that the model's layers are in now.

    Call it after changing forms by hand, before ``save_pretrained``; DynamicRank does so by itself. With low-rank
    layers the configuration gets the block ``quantization_config``, and weights are saved under the names that they
    have at run time: the mapping to an architecture's published names does not know U and V. Without any, all is as it
    was before.

    A configuration object may be shared with other models, and be the caller's: the model gets a copy of its own before
    the block is first written. Of a container, such as a ``SentenceTransformer`` or an own module around a model of
    transformers, each model inside is declared, under its own names. A model without a configuration of transformers
    is left alone.
    """
    for root in transformers_models(model):
        _declare(root)


def _declare(model: nn.Module) -> None:
    block = declaration(model)
    if block is None:
        _withdraw(model)
        model.__dict__.pop(_OWN, None)
    elif _method(model.config) in (None, METHOD):
        _own_configuration(model)
        _config(model).quantization_config = block
        for submodel in _submodels(model):
            _keep_runtime_names(submodel)
            # transformers takes the dtype of attention from the first nn.Linear it finds, unless it reads this mark.
            _config(submodel)._is_quantized = True
    else:
        logger.warning(
            "the model is quantized by '%s', and its configuration has no room for a second method: with low-rank "
            "layers, what save_pretrained writes will not load.",
            _method(model.config),
        )


@contextlib.contextmanager
def undeclared(model: nn.Module) -> Iterator[None]:
    """For saving a dense state dict of a model in any form: the configuration and names of a dense model."""
    for root in transformers_models(model):
        _withdraw(root)
    try:
        yield
    finally:
        declare(model)


@contextlib.contextmanager
def runtime_names(model: nn.Module) -> Iterator[None]:
    """Save under the names that the model has at run time.

    ``save_pretrained`` maps names back to those of older releases for some architectures (ViT, BERT-like ones), but the
    Trainer resumes without mapping them again, and would miss every renamed weight; and that mapping does not know the
    tensors of other forms.
    """
    missing = object()
    kept = getattr(model, "_weight_conversions", missing)
    vars(model)["_weight_conversions"] = []
    try:
        yield
    finally:
        if kept is missing:
            del model._weight_conversions
        else:
            vars(model)["_weight_conversions"] = kept


def transformers_models(model: nn.Module) -> list[nn.Module]:
    """The outermost models of transformers in a model: itself, or those that a container holds."""
    found: dict[str, nn.Module] = {}
    for name, module in unwrapped(model).named_modules():
        if _is_of_transformers(module) and not any(not other or name.startswith(f"{other}.") for other in found):
            found[name] = module
    return list(found.values())


def _own_configuration(model: nn.Module) -> None:
    """A copy of the configuration, in every module of the model that holds it or a part of it: the layers must go on
    seeing what is set on ``model.config``, such as the implementation of attention."""
    if model.__dict__.get(_OWN) is model.config:
        return
    copies: dict[int, Any] = {}
    for submodel in _submodels(model):
        copy.deepcopy(submodel.config, copies)
    for module in model.modules():
        for name, value in vars(module).items():
            if hasattr(value, "to_diff_dict") and id(value) in copies:
                vars(module)[name] = copies[id(value)]
    model.__dict__[_OWN] = model.config


def _withdraw(model: nn.Module) -> None:
    if _method(model.config) == METHOD:
        del _config(model).quantization_config
    for submodel in _submodels(model):
        kept = submodel.__dict__.pop(_KEPT, None)
        if kept is not None:
            submodel.__dict__.pop("_weight_conversions", None)
            submodel.__dict__.update(kept)
            vars(_config(submodel)).pop("_is_quantized", None)


def _keep_runtime_names(model: nn.Module) -> None:
    """Switch off the mapping of names on saving, and keep what was set: nothing at all means transformers' default."""
    own = model.__dict__
    if _KEPT not in own:
        own[_KEPT] = {key: own[key] for key in ("_weight_conversions",) if key in own}
    own["_weight_conversions"] = []


def _config(model: nn.Module) -> Any:
    return model.config


def _method(config: Any) -> str | None:
    block = getattr(config, "quantization_config", None)
    return block.get("quant_method") if isinstance(block, dict) else getattr(block, "quant_method", None)


def _submodels(model: nn.Module) -> Iterator[nn.Module]:
    """All that could be saved on its own: the model and the models inside it, such as the one without a head."""
    return filter(_is_of_transformers, model.modules())


def _is_of_transformers(model: nn.Module) -> bool:
    # By its class: containers such as SentenceTransformer and GLiNER have save_pretrained and a configuration too.
    return any(f"{cls.__module__}.{cls.__qualname__}" == _MODEL for cls in type(model).__mro__)
