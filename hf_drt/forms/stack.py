"""ExpertStack: the dense form of fused experts, E matrices in one parameter, as a layer like any other.

A mixture of experts keeps, say, all down projections in one parameter ``down_proj (E, out, in)`` of its experts module,
which is no layer. :func:`layer_of` gives such a parameter the face of one; in low-rank form a module
(:mod:`hf_drt.forms.stack_modules`) takes its place, under its name, and the experts module's own forward pass goes on
reading it.
"""

from typing import Any

from torch import nn

from hf_drt.forms.attention import PROJECTIONS, projection
from hf_drt.forms.layout import Layout
from hf_drt.forms.marks import FROZEN

# Experts that are no subject of transformers' use_experts_implementation, by whether W is stored as (E, in, out).
KNOWN_LAYOUTS = {"Llama4TextExperts": True, "LongcatFlashExperts": False, "Step3p7Experts": False}
LEAVES = ("gate_up_proj", "up_proj", "down_proj")
_ORDER = "_drt_parameter_order"


class ExpertStack(nn.Module):
    """``W_e`` of every expert e in one parameter ``weight``: ``(E, out, in)``, or ``(E, in, out)`` if transposed.

    No part of the model: the parameter is that of the experts module, the very object.

    Attributes:
        layout: With E as its ``count``.
        in_features, out_features: Of one expert.
    """

    bias = None

    def __init__(self, weight: nn.Parameter, transposed: bool):
        super().__init__()
        self.weight = weight
        count, rows, columns = weight.shape
        self.layout = Layout(transposed, count=count)
        self.out_features, self.in_features = (columns, rows) if transposed else (rows, columns)


def stack_count(module: nn.Module) -> int | None:
    """Number of experts in a layer of fused experts, in any form; None for a layer of one matrix."""
    layout = getattr(module, "layout", None)
    return layout.count if isinstance(layout, Layout) else None


def stored_transposed(owner: nn.Module) -> bool | None:
    """Whether an experts module stores its weights as ``(E, in, out)``; None where its layout is not known."""
    if type(owner).__name__ in KNOWN_LAYOUTS:
        return KNOWN_LAYOUTS[type(owner).__name__]
    interface = all(hasattr(owner, name) for name in ("is_transposed", "has_gate", "has_bias", "_apply_gate"))
    return bool(owner.is_transposed) if interface else None


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name: a module, the :class:`ExpertStack` of a parameter of fused experts, or a view of the part
    of an ``nn.MultiheadAttention``'s parameters that is one of its projections.

    Raises:
        AttributeError: There is none.
    """
    owner, leaf = place_of(model, name)
    if leaf in PROJECTIONS and type(owner) is nn.MultiheadAttention:
        return projection(owner, leaf)
    weight = owner._parameters.get(leaf)
    if weight is None:
        return _submodule(owner, leaf)
    transposed = stored_transposed(owner)
    if transposed is None or weight.ndim != 3:
        raise AttributeError(f"{name} is a parameter, and none of fused experts of a known layout")
    stack = ExpertStack(weight, transposed)
    if leaf in (marks := vars(owner).get(FROZEN, {})):
        stack.__dict__[FROZEN] = marks[leaf]
    return stack


def dense_key(model: nn.Module, name: str) -> str:
    """A layer's dense weight in the model's state dict; its form now does not matter."""
    return name if stack_count(layer_of(model, name)) is not None else f"{name}.weight"


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a layer, and the layer's name in it."""
    parent, _, leaf = name.rpartition(".")
    return _submodule(model, parent), leaf


def _submodule(model: nn.Module, name: str) -> nn.Module:
    """As ``get_submodule``, which asks for each step by three look-ups of attributes."""
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        module = None if module is None else module._modules.get(part)
    return model.get_submodule(name) if module is None else module


def attach(owner: nn.Module, leaf: str, new: nn.Module) -> None:
    """Put a layer of fused experts, in any form, in its place in the experts module.

    Parameters and low-rank layers are kept in the order of the dense module's parameters, whatever changed when: the
    state of an optimizer is keyed by that order.
    """
    order = owner.__dict__.get(_ORDER)
    if order is None:
        order = owner.__dict__[_ORDER] = list(owner._parameters)
        owner.register_load_state_dict_pre_hook(_read_marks)
    owner._parameters.pop(leaf, None)
    owner._modules.pop(leaf, None)
    marks = owner.__dict__.setdefault(FROZEN, {})
    marks.pop(leaf, None)
    if FROZEN in vars(new):
        marks[leaf] = vars(new)[FROZEN]
    if isinstance(new, ExpertStack):
        owner._parameters[leaf] = new.weight
    else:
        owner._modules[leaf] = new
    for held in (owner._parameters, owner._modules):
        _sort(held, order)


def _sort(held: dict[str, Any], order: list[str]) -> None:
    for name in [name for name in order if name in held]:
        held[name] = held.pop(name)


def _read_marks(owner: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """The entry of no elements that a low-rank layer leaves under the parameter's name is none of the owner's own."""
    errors = args[-1]
    for leaf in LEAVES:
        module = owner._modules.get(leaf)
        if module is None or stack_count(module) is None:
            continue
        mark = state.pop(prefix + leaf, None)
        if mark is not None and mark.numel() > 0:
            errors.append(
                f"{prefix}{leaf} is a dense weight of shape {tuple(mark.shape)}, but the layer is in form "
                f"{module.form}. Convert the layer to Dense() first, or load a checkpoint of the same form."
            )
