"""Small layers of every kind, in every form that they can have: those of the registry of products among them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_drt.forms import (
    PRODUCTS,
    Adapter,
    Dense,
    ExpertStack,
    Factored,
    Form,
    LayerShape,
    Product,
    layout_of,
    weight_shape,
)

RANK = 6


@dataclass(frozen=True)
class Kind:
    """A kind of layer, and a small one of it.

    Attributes:
        make: Gives the dense layer, in float32 on the CPU.
        inputs: Shape of an input.
        apply: The output as a model computes it, in whatever form the layer is.
        dense: The output of dense mathematics, of ``(input, weight as it is stored, bias)``.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    apply: Callable[[nn.Module, Tensor], Tensor]
    dense: Callable[[Tensor, Tensor, Tensor | None], Tensor]

    def layer(self) -> nn.Module:
        """The dense layer, always with the same values."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()


@dataclass(frozen=True)
class Case:
    """A layer of a kind in a form."""

    kind: Kind
    form: Form

    @property
    def name(self) -> str:
        """Such as ``convolution: tucker factored``."""
        return f"{self.kind.name}: {_told(self.form)}"

    @property
    def repeats(self) -> bool:
        """Whether the code that computes it is that of another case: a start of other values, another reading of W."""
        return (isinstance(self.form, Adapter) and self.form.init != "zero") or self.kind is KINDS[-1]


def _call(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def moved(layer: nn.Module, *to: Any) -> nn.Module:
    """The layer itself, with its tensors on a device or in a dtype. Experts in low-rank form answer ``to`` of their own
    as a weight does, and are moved with the module that holds them."""
    nn.ModuleList([layer]).to(*to)
    return layer


def _each_expert(layer: nn.Module, x: Tensor) -> Tensor:
    """Expert by expert, as in the loop of a model's own forward pass."""
    weight: Any = layer.weight
    return torch.stack([F.linear(x[expert], weight[expert]) for expert in range(len(x))])


def _all_experts(layer: nn.Module, x: Tensor) -> Tensor:
    """With the weights of all at once, as in implementations that batch products."""
    weight: Any = layer.weight
    return torch.bmm(weight[torch.arange(len(x), device=x.device)], x.mT).mT


def _experts() -> nn.Module:
    return ExpertStack(nn.Parameter(torch.randn(3, 48, 32) / 6), False)


def _of_experts(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return x @ W.mT


KINDS = (
    Kind("linear", lambda: nn.Linear(64, 96), (4, 8, 64), _call, F.linear),
    Kind(
        "convolution", lambda: nn.Conv2d(12, 16, 3, stride=2, padding=1), (4, 12, 10, 10), _call,
        lambda x, W, bias: F.conv2d(x, W, bias, stride=2, padding=1),
    ),
    Kind("experts", _experts, (3, 16, 32), _each_expert, _of_experts),
    Kind("experts, batched", _experts, (3, 16, 32), _all_experts, _of_experts),
)  # fmt: skip


def cases() -> Iterator[Case]:
    """Every kind of layer in every form: dense ones first, then those of each product that suits it."""
    for kind in KINDS:
        layer = kind.layer()
        layout, shape = layout_of(layer), weight_shape(layer)
        yield Case(kind, Dense())
        yield Case(kind, Dense(frozen=True))
        if not layout.kernel and layout.count is None:
            yield Case(kind, Dense(frozen=True, dtype="bfloat16"))
        for name, product in PRODUCTS.items():
            if product.suits(shape):
                rank, rank_in = ranks(product, shape, RANK)
                yield Case(kind, Factored(rank, name, rank_in))
                yield Case(kind, Adapter(rank, 2.0 * rank, "zero", name, rank_in))
                yield Case(kind, Adapter(rank, 2.0 * rank, "principal", name, rank_in))


def ranks(product: Product, shape: LayerShape, rank: int | None = None) -> tuple[int, int | None]:
    """A rank that such a layer can have, by default the largest, and the second one of a product that has it."""
    limit, limit_in = product.rank_limit(shape), product.rank_in_limit(shape)
    rank, rank_in = (limit, limit_in) if rank is None else (min(rank, limit), min(rank, limit_in))
    return rank, rank_in if product.has_rank_in else None


def _told(form: Form) -> str:
    match form:
        case Dense(frozen=False):
            return "dense"
        case Dense(dtype=None):
            return "dense, frozen"
        case Dense(dtype=dtype):
            return f"dense, frozen in {dtype}"
        case Factored():
            return f"{form.decomposition} factored"
        case Adapter():
            return f"{form.decomposition} adapter{', principal' if form.init == 'principal' else ''}"
