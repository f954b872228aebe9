"""The modules behind the forms, as replacements of ``nn.Linear`` and of transformers' ``Conv1D``.

Both low-rank modules are plain ``nn.Module`` objects, no subclasses of ``nn.Linear``: libraries that special-case
``nn.Linear`` would otherwise drop the factors in silence. Each keeps the *shell* of the dense module it stands for (the
same object without its tensors), so that inflation gives back the same class with the same attributes.
"""

import copy
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.forms.lazy import EffectiveWeight
from hf_drt.forms.specs import Adapter, Dense, Factored, Form
from hf_drt.forms.stack import ExpertStack
from hf_drt.spectral import full_precision, working_dtype

CONV1D = "transformers.pytorch_utils.Conv1D"


def is_transposed(dense: nn.Module) -> bool:
    """True for transformers' ``Conv1D`` (GPT-2), whose weight is stored as ``(in, out)``, and for fused experts that
    are stored so."""
    if isinstance(dense, ExpertStack):
        return dense.stored_transposed
    return any(f"{cls.__module__}.{cls.__qualname__}" == CONV1D for cls in type(dense).__mro__)


def as_matrix(tensor: Tensor, transposed: bool) -> Tensor:
    """The stored weight as ``W (out, in)``, or back: transposed for ``Conv1D``, itself otherwise."""
    return tensor.mT if transposed else tensor


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of a layer in any form."""
    if is_transposed(module):
        return module.nf, module.nx
    return module.out_features, module.in_features


def trainable_weights(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """What the form trains of W, in the order of ``named_parameters()``: (weight,), (U, V) or (lora_A, lora_B)."""
    match module:
        case FactoredLinear():
            return module.U, module.V
        case AdapterLinear():
            return module.lora_A, module.lora_B
    return (module.weight,)


def tensor_shapes(
    form: Form, shape: tuple[int, int], transposed: bool, count: int | None = None
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a layer's stored tensors, bias aside, for a layer of shape ``(out, in)``; ``count`` is that
    of its experts, if it has any."""
    if count is not None:
        return {name: (count, *size) for name, size in tensor_shapes(form, shape, transposed).items()}
    out, into = shape
    stored = (into, out) if transposed else shape
    match form:
        case Factored(rank):
            return {"U": (out, rank), "V": (rank, into)}
        case Adapter(rank):
            return {"base": stored, "lora_A": (rank, into), "lora_B": (out, rank)}
    return {"weight": stored}


def form_of(module: nn.Module) -> Form:
    """The form that a layer is in."""
    return module.form if isinstance(module, LowRankLinear) else Dense()


def with_weight(shell: nn.Module, weight: nn.Parameter | None, bias: nn.Parameter | None, training: bool) -> nn.Module:
    """A copy of a dense module that holds the given tensors: same class, same attributes."""
    dense = copy.copy(shell)
    dense._parameters = dict.fromkeys(shell._parameters)
    dense._buffers, dense._modules = dict(shell._buffers), dict(shell._modules)
    dense._parameters["weight"] = weight
    if "bias" in dense._parameters:
        dense._parameters["bias"] = bias
    dense.training = training
    return dense


class LowRankLinear(nn.Module):
    """What both low-rank forms share. Attributes that models read of a linear layer exist in every form:
    ``in_features``, ``out_features``, ``bias``, ``form`` and ``weight``, the effective W in the dense layout.
    """

    form: Factored | Adapter
    tensors: ClassVar[tuple[str, ...]]  # names of the form's own parameters

    def __init__(self, dense: nn.Module, form: Factored | Adapter):
        super().__init__()
        self.out_features, self.in_features = weight_shape(dense)
        self.form = form
        self.transposed = is_transposed(dense)
        self.training = dense.training
        if self.transposed:
            self.nf, self.nx = dense.nf, dense.nx
        # In a list, so that nn.Module does not register it as a child.
        self._shell = [with_weight(dense, None, None, dense.training)]

    def dense_with(self, weight: nn.Parameter) -> nn.Module:
        """The dense module this layer stands for, with ``weight`` in its layout and this layer's bias."""
        return with_weight(self._shell[0], weight, self.bias, self.training)

    def matrix(self) -> Tensor:
        """The effective ``W (out, in)``, differentiable."""
        raise NotImplementedError

    def pair(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        """``(L, R, s)`` with ``L (out, r)`` and ``R (r, in)`` trainable and ``W = const + s L R``."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The effective W in the layout of the dense layer: ``(out, in)``, or ``(in, out)`` for Conv1D.

        Formed when it is computed with; its shape, dtype and device cost nothing.
        """
        if torch.compiler.is_compiling():  # the compiler drops an unused product by itself
            return self._formed_weight()
        shape = (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)
        trainable = torch.is_grad_enabled() and any(p.requires_grad for p in self.pair()[:2])
        weight = EffectiveWeight(self._formed_weight, shape, self.pair()[0], trainable)
        # Set on the layer while a checkpoint is loaded: an owner's _init_weights then passes over what it is set on.
        weight._is_hf_initialized = self.__dict__.get("_is_hf_initialized", False)
        return weight

    def _formed_weight(self) -> Tensor:
        return as_matrix(self.matrix(), self.transposed)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.form}"

    # A checkpoint in low-rank form that is loaded into a dense model would, since transformers loads non-strictly,
    # leave random weights behind with no more than a warning. An entry of the dense weight's name and of no elements
    # makes that a size mismatch, which is raised even then.
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(self.pair()[0], "to_local"):  # sharded: every entry of the state dict is looked up as a parameter
            return
        if key := self.dense_key(prefix[:-1]).removeprefix("."):
            destination[key] = self.pair()[0].detach().new_empty(self.mark_shape())

    def dense_key(self, name: str) -> str:
        """The dense weight's entry in the state dict of a model that calls the layer by this name."""
        return f"{name}.weight"

    def mark_shape(self) -> tuple[int, ...]:
        """Shape of that entry, which has no elements."""
        return (self.in_features, 0) if self.transposed else (0, self.in_features)

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
        others = {name for cls in LowRankLinear.__subclasses__() for name in cls.tensors} - set(self.tensors)
        if foreign := sorted(prefix + name for name in others if prefix + name in state_dict):
            error_msgs.append(
                f"{prefix[:-1]} is in form {self.form} here, but in another in the checkpoint, which holds "
                f"{', '.join(foreign)}. Load a checkpoint of the same form."
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class FactoredLinear(LowRankLinear):
    """``y = U (V x) + b`` with ``U (out, r)`` and ``V (r, in)``: W = U V never exists."""

    tensors = ("U", "V")

    def __init__(self, dense: nn.Module, form: Factored, U: nn.Parameter, V: nn.Parameter, bias: nn.Parameter | None):
        super().__init__(dense, form)
        self.U, self.V = U, V
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.V), self.U, self.bias)

    def matrix(self) -> Tensor:
        return self.U @ self.V

    def pair(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        return self.U, self.V, 1.0


class AdapterLinear(LowRankLinear):
    """``y = base x + (alpha / r) lora_B (lora_A x) + b``; ``base`` is frozen and stored in the dense layout."""

    tensors = ("base", "lora_A", "lora_B")

    def __init__(
        self,
        dense: nn.Module,
        form: Adapter,
        base: nn.Parameter,
        lora_A: nn.Parameter,
        lora_B: nn.Parameter,
        bias: nn.Parameter | None,
    ):
        super().__init__(dense, form)
        self.base, self.lora_A, self.lora_B = base, lora_A, lora_B
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, as_matrix(self.base, self.transposed), self.bias)
        low = F.linear(x, self.lora_A)
        if not self.training:  # rounded as PEFT rounds: an adapter that was trained there gives the same bits here
            return y + F.linear(low, self.lora_B) * self.form.scaling
        # One product that adds and scales: the sum of two outputs would be a third pass over memory of their size.
        low, sum_with = low.reshape(-1, self.form.rank), y.reshape(-1, self.out_features)
        return torch.addmm(sum_with, low, self.lora_B.mT, alpha=self.form.scaling).reshape(y.shape)

    def matrix(self) -> Tensor:
        return as_matrix(self.base, self.transposed) + self.form.scaling * (self.lora_B @ self.lora_A)

    def pair(self) -> tuple[nn.Parameter, nn.Parameter, float]:
        return self.lora_B, self.lora_A, self.form.scaling


def kaiming_rows(rank: int, width: int, generator: torch.Generator | None) -> Tensor:
    """``(rank, width)`` from U(-1/sqrt(width), 1/sqrt(width)), the start of LoRA's A.

    The CPU generator is the caller's own, so that the global one is untouched and all processes agree.
    """
    bound = 1 / math.sqrt(width)
    return torch.empty(rank, width).uniform_(-bound, bound, generator=generator or torch.Generator().manual_seed(0))


def plus_product(W: Tensor, L: Tensor, R: Tensor, scale: float) -> Tensor:
    """``W + scale L R``, of one matrix or of each of a stack."""
    return (torch.addmm if W.ndim == 2 else torch.baddbmm)(W, L, R, alpha=scale)


@full_precision()
def effective_weight(module: nn.Module) -> Tensor:
    """``W (out, in)`` of a layer in any form, merged in float32 or better; ``(E, out, in)`` of fused experts."""
    dtype = working_dtype(next(module.parameters()).dtype)
    match module:
        case FactoredLinear():
            return module.U.detach().to(dtype) @ module.V.detach().to(dtype)
        case AdapterLinear():
            L, R, scale = module.pair()
            base = as_matrix(module.base.detach(), module.transposed).to(dtype)
            return plus_product(base, L.detach().to(dtype), R.detach().to(dtype), scale)
    return as_matrix(module.weight.detach(), is_transposed(module)).to(dtype)
