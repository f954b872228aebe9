"""The modules behind the forms, as replacements of ``nn.Linear`` and of transformers' ``Conv1D``.

Both low-rank modules are plain ``nn.Module`` objects, no subclasses of ``nn.Linear``: libraries that special-case
``nn.Linear`` would otherwise drop the factors in silence. Each keeps the *shell* of the dense module it stands for (the
same object without its tensors), so that inflation gives back the same class with the same attributes.
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.forms.kept import BASE, SCALE, decomposed_dtype, in_one_dtype, linear, widened
from hf_drt.forms.layout import LayerShape, Layout, dense_layout, is_transposed
from hf_drt.forms.lazy import EffectiveWeight
from hf_drt.forms.marks import FROZEN
from hf_drt.forms.plain import strip
from hf_drt.forms.products import Product, tensor_names
from hf_drt.forms.specs import Adapter, Dense, Factored, Form
from hf_drt.forms.structures import merged
from hf_drt.linalg import full_precision


def layout_of(module: nn.Module) -> Layout:
    """How the dense weight of a layer in any form is stored."""
    return module.layout if isinstance(module, FormedLinear) else dense_layout(module)


def weight_shape(module: nn.Module) -> LayerShape:
    """``(out, in)`` of a layer in any form; the kernel of a convolution is seen as a matrix."""
    layer, layout = _as_layer(module), layout_of(module)
    if is_transposed(module):
        return LayerShape(layer.nf, layer.nx)
    if kernel := layout.kernel:
        return LayerShape(layer.out_channels, layer.in_channels * math.prod(kernel), kernel, layer.stride)
    return LayerShape(layer.out_features, layer.in_features, experts=layout.count)


def _as_layer(module: nn.Module) -> Any:
    """The module: what attributes a dense layer of a model has, no type of torch says."""
    return module


def trainable_weights(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """What an optimizer holds of W, in the order of ``named_parameters()``: (weight,), (U, V) or (lora_A, lora_B).

    A frozen W keeps its place there, without a gradient or a state, so that it can be trained again."""
    if not isinstance(module, LowRankLinear):
        kept = module._parameters.get("weight")  # not by attribute: of a frozen W in fewer bits that is another tensor
        return (_as_layer(module).weight if kept is None else kept,)
    return tuple(getattr(module, name) for name in module.tensors if name not in (BASE, SCALE))


def form_of(module: nn.Module) -> Form:
    """The form that a layer is in."""
    if isinstance(module, FormedLinear):
        return module.form
    return Dense(frozen=FROZEN in vars(module))


def frozen_with(
    dense: nn.Module, weight: nn.Parameter, bias: nn.Parameter | None, training: bool, by_user: bool
) -> nn.Module:
    """A copy of a dense module, as by :func:`with_weight`, in the form of a frozen W."""
    frozen = with_weight(dense, weight, bias, training)
    frozen.__dict__[FROZEN] = by_user
    return frozen


def with_weight(shell: nn.Module, weight: nn.Parameter | None, bias: nn.Parameter | None, training: bool) -> nn.Module:
    """A copy of a dense module that holds the given tensors: same class, same attributes, but no hooks of its, and no
    functions that are set on it in place of its class's."""
    dense = copy.copy(shell)
    strip(dense, shell)
    dense.__dict__.pop(FROZEN, None)
    dense._parameters = dict.fromkeys(shell._parameters)
    dense._buffers, dense._modules = dict(shell._buffers), dict(shell._modules)
    dense._parameters["weight"] = weight
    if "bias" in dense._parameters:
        dense._parameters["bias"] = bias
    dense.training = training
    return dense


class FormedLinear(nn.Module):
    """What stands in a dense layer's place. Attributes that models read of a linear layer exist in every form:
    ``in_features``, ``out_features``, ``bias``, ``form`` and ``weight``, the effective W in the dense layout.
    """

    form: Form
    bias: nn.Parameter | None
    tensors: tuple[str, ...]  # names of the form's own parameters

    def __init__(self, dense: nn.Module, form: Form, tensors: dict[str, nn.Parameter], bias: nn.Parameter | None):
        super().__init__()
        self.form, self.layout = form, dense_layout(dense)
        self.out_features, self.in_features = weight_shape(dense)
        self.training = dense.training
        if is_transposed(dense):
            self.nf, self.nx = weight_shape(dense)
        # In a list, so that nn.Module does not register it as a child.
        self._shell = [with_weight(dense, None, None, dense.training)]
        self.tensors = tuple(tensors)
        for name, tensor in (*tensors.items(), ("bias", bias)):
            self.register_parameter(name, tensor)

    @property
    def shell(self) -> nn.Module:
        """The dense module that this layer stands for, without its tensors."""
        return self._shell[0]

    def dense_with(self, weight: nn.Parameter) -> nn.Module:
        """The dense module this layer stands for, with ``weight`` in its layout and this layer's bias."""
        return with_weight(self.shell, weight, self.bias, self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form}"


class LowRankLinear(FormedLinear):
    """What both low-rank forms share."""

    form: Factored | Adapter
    product: Product
    path: tuple[str, ...]  # names of the product's parameters, in the order in which an input meets them

    def __init__(
        self,
        dense: nn.Module,
        form: Factored | Adapter,
        tensors: dict[str, nn.Parameter],
        bias: nn.Parameter | None,
    ):
        super().__init__(dense, form, tensors, bias)
        self.product = form.product
        self.path = tuple(name for name in self.product.names(form.adapts) if name in tensors)

    def matrix(self) -> Tensor:
        """The effective ``W (out, in)``, differentiable."""
        return merged(self.form, {name: getattr(self, name) for name in self.tensors}, self.layout)

    def product_tensors(self) -> list[Tensor]:
        """The product's tensors, in the order in which an input meets them."""
        return [getattr(self, name) for name in self.path]

    def pair(self) -> tuple[Tensor, Tensor, float]:
        """``(L, R, s)`` with ``L (out, r)`` and ``R (r, in)`` trainable and ``W = const + s L R``."""
        return *self.product.factors(self.product_tensors()), self.form.scaling

    @property
    def weight(self) -> Tensor:
        """The effective W in the layout of the dense layer: ``(out, in)``, or ``(in, out)`` for Conv1D.

        Formed when it is computed with; its shape, dtype and device cost nothing.
        """
        if torch.compiler.is_compiling():  # the compiler drops an unused product by itself
            return self._formed_weight()
        shape = self.layout.shape(self.out_features, self.in_features)
        trainable = torch.is_grad_enabled() and any(p.requires_grad for p in trainable_weights(self))
        weight = EffectiveWeight(self._formed_weight, shape, trainable_weights(self)[0], trainable)
        # Set on the layer while a checkpoint is loaded: an owner's _init_weights then passes over what it is set on.
        weight._is_hf_initialized = self.__dict__.get("_is_hf_initialized", False)
        return weight

    def _formed_weight(self) -> Tensor:
        return self.layout.stored(self.matrix())

    # A checkpoint in low-rank form that is loaded into a dense model would, since transformers loads non-strictly,
    # leave random weights behind with no more than a warning. An entry of the dense weight's name and of no elements
    # makes that a size mismatch, which is raised even then.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        like = trainable_weights(self)[0]
        if type(like) is not nn.Parameter:  # sharded: every entry of the state dict is looked up as a parameter
            return
        if key := self.dense_key(prefix[:-1]).removeprefix("."):
            destination[key] = like.detach().new_empty(self.layout.shape(0, self.in_features))

    def dense_key(self, name: str) -> str:
        """The dense weight's entry in the state dict of a model that calls the layer by this name."""
        return f"{name}.weight"

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        sentinel = state_dict.pop(prefix + "weight", None)
        if sentinel is not None and sentinel.numel() > 0:
            error_msgs.append(
                f"{prefix}weight is a dense weight of shape {tuple(sentinel.shape)}, but the layer is in form "
                f"{self.form}. Convert the layer to Dense() first, or load a checkpoint of the same form."
            )
        # Of another low-rank form? Own tensors may be missing rightly: a sharded checkpoint is loaded in pieces.
        others = tensor_names() - set(self.tensors)
        if foreign := sorted(prefix + name for name in others if prefix + name in state_dict):
            error_msgs.append(
                f"{prefix[:-1]} is in form {self.form} here, but in another in the checkpoint, which holds "
                f"{', '.join(foreign)}. Load a checkpoint of the same form."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class FactoredLinear(LowRankLinear):
    """``y = W x + b`` by the product's tensors, ``U (V x) + b`` by those of an SVD: W never exists."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product.linear(x, self.product_tensors(), self.bias)


class AdapterLinear(LowRankLinear):
    """``y = base x + (alpha / r) lora_B (lora_A x) + b``, or with another product; ``base`` is frozen and stored in the
    dense layout.

    In ``form.dtype`` where that is set, widened for each product: in int8 it holds codes, and ``base_scale`` the scale
    of each row of W, in float32 and of the same layout."""

    form: Adapter  # pyright: ignore[reportIncompatibleVariableOverride]
    base: nn.Parameter

    @property
    def kept_scale(self) -> nn.Parameter | None:
        """Of the base's rows, where it is kept in int8."""
        return self._parameters.get(SCALE)

    def whole_base(self) -> Tensor:
        """The base in the dense layout, and in the dtype of the factors: itself where it is kept so."""
        return widened(self.base, self.kept_scale, trainable_weights(self)[0].dtype)

    def matrix(self) -> Tensor:
        tensors = {name: getattr(self, name) for name in self.path}
        return merged(self.form, tensors | {BASE: self.whole_base()}, self.layout)

    @property
    def is_split(self) -> bool:
        """Whether its product came out of that of the adapter before, if there was one."""
        return isinstance(self.form, Adapter) and self.form.init == "split"

    def forward(self, x: Tensor) -> Tensor:
        y = self._through_base(x)
        if not self.training:  # rounded as PEFT rounds: an adapter that was trained there gives the same bits here
            return y + self.product.linear(x, self.product_tensors()) * self.form.scaling
        return self.product.added_linear(y, x, self.product_tensors(), self.form.scaling)

    def _load_from_state_dict(self, state_dict, prefix, *args: Any) -> None:
        stored = state_dict.get(prefix + BASE)
        if stored is not None and (stored.dtype == torch.int8) != (self.base.dtype == torch.int8):
            # copied, codes would pass for weights, and weights be cut to whole numbers
            args[-1].append(
                f"{prefix}{BASE} is in {stored.dtype} in the checkpoint, and in {self.base.dtype} here, in form "
                f"{self.form}. Load a checkpoint of the same form."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _through_base(self, x: Tensor) -> Tensor:
        W = self.layout.matrix(self.base)
        if self.form.dtype is None:
            return F.linear(x, W, self.bias)
        scale = None if self.kept_scale is None else self.layout.matrix(self.kept_scale)
        return linear(x, W, scale, self.bias)


@full_precision()
def effective_weight(module: nn.Module) -> Tensor:
    """``W (out, in)`` of a layer in any form, merged in float32 or better; ``(E, out, in)`` of fused experts."""
    return merged(form_of(module), working_tensors(module), layout_of(module))


def working_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The layer's tensors by name, bias aside, without their graph and in float32 or better."""
    own = {name: p for name, p in module.named_parameters() if name != "bias"}
    return in_one_dtype(own, decomposed_dtype(own))
