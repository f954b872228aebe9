"""Which layer of a model is which of a checkpoint? Names differ by the prefix of the part without a head."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import nn

from hf_drt.checkpoint import AGAIN, CheckpointError, DeclaredLayer
from hf_drt.forms import FormedLinear, check_rank, layer_of, weight_shape
from hf_drt.messages import some
from hf_drt.targets import is_layer

_SAME = "Load it with the architecture and the configuration that it was saved from."

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def candidates(name: str, prefix: str) -> Iterator[str]:
    """Names that a layer may have in a model with or without a head, in the order in which transformers tries them."""
    if prefix and name.startswith(f"{prefix}."):
        yield name.removeprefix(f"{prefix}.")
    if prefix:
        yield f"{prefix}.{name}"
    yield name


def matched(model: "PreTrainedModel", declared: Sequence[DeclaredLayer]) -> dict[str, DeclaredLayer]:
    """The declared layers by their names in a dense model.

    Layers may be absent where transformers drops their weights without an error: in another head, and where the model
    class says so (a decoder, of an encoder).

    Raises:
        CheckpointError: A layer is absent otherwise, all are, or it is no layer of that shape, or has not the form.
    """
    found, absent = {}, []
    for layer in declared:
        name = next((n for n in candidates(layer.name, model.base_model_prefix) if _has(model, n)), None)
        if name is None:
            absent.append(layer.name)
            continue
        _check_layer(f"{name} of {type(model).__name__}", layer_of(model, name), layer)
        found[name] = layer
    lost = absent if not found else _lost(model, absent, [layer.name for layer in declared])
    if lost:
        raise CheckpointError(
            f"{type(model).__name__} lacks {some(lost)}, which the checkpoint holds in low-rank form. {_SAME}"
        )
    return found


def _has(model: nn.Module, name: str) -> bool:
    try:
        layer_of(model, name)
    except AttributeError:
        return False
    return True


def _check_layer(name: str, module: nn.Module, layer: DeclaredLayer) -> None:
    if not is_layer(module) or isinstance(module, FormedLinear):
        raise CheckpointError(
            f"{name} is a {type(module).__name__}, and in the checkpoint a linear layer of shape (out, in) = "
            f"{layer.shape}. {_SAME}"
        )
    if weight_shape(module) != layer.shape:
        raise CheckpointError(
            f"{name} has shape (out, in) = {weight_shape(module)}, and {layer.shape} in the checkpoint. {_SAME}"
        )
    try:
        check_rank(module, layer.form)
    except ValueError as error:
        raise CheckpointError(
            f"{name} cannot have the form {layer.form} that config.json declares: {error} config.json is damaged. "
            f"{AGAIN}"
        ) from None


def _lost(model: "PreTrainedModel", absent: list[str], names: list[str]) -> list[str]:
    """The absent layers that transformers does not mean to drop."""
    base, ignored = f"{model.base_model_prefix}.", model._keys_to_ignore_on_load_unexpected or ()
    has_head = any(name.startswith(base) for name in names)
    inside = (name for name in absent if not has_head or name.startswith(base))
    return [name for name in inside if not any(re.search(pattern, f"{name}.weight") for pattern in ignored)]
