"""The product of two matrices, as a truncated SVD gives them."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_drt.forms.bottleneck import narrow
from hf_drt.forms.layout import LayerShape
from hf_drt.forms.products.product import Convolution, LowRank, Shapes, Source, TwoFactors
from hf_drt.forms.specs import Adapter
from hf_drt.forms.stack_math import joined, of_each, stacked_truncation
from hf_drt.forms.starts import spectral_factors
from hf_drt.linalg import Truncation, truncated_product, truncated_svd, weighted_product, weighted_truncation


class Svd(TwoFactors):
    """``W = U V`` with ``U (out, r)`` and ``V (r, in)``, in adapters ``lora_B lora_A``; of fused experts one of each.

    Of a convolution V is a kernel to r channels, kept as the matrix that it is, and U a 1 x 1 convolution to the
    outputs. Decomposed by the SVD (:mod:`hf_drt.linalg`); where the layer is factored already, by that of its factors.
    An adapter that is split is decomposed by its own factors too, and by its base's top directions where its rank
    grows.
    """

    name = "svd"
    help = "two matrices; of a convolution k x k to the rank, then 1 x 1"
    weights = "r (in k k + out)"
    found_by = "SVD of the matrix (out, in k k)"
    roles = ("V", "U")
    two_matrices = True
    weighs_inputs = True

    def refusal(self, shape: LayerShape) -> None:
        return None

    def names(self, adapts: bool) -> tuple[str, ...]:
        return ("lora_A", "lora_B") if adapts else ("V", "U")

    def needed(self, adapts: bool) -> tuple[str, ...]:
        return ("lora_A", "lora_B") if adapts else ("U", "V")

    def shapes(self, form: LowRank, shape: LayerShape) -> Shapes:
        U, V = (shape.d_out, form.rank), (form.rank, shape.d_in)
        return {"lora_A": V, "lora_B": U} if form.adapts else {"U": U, "V": V}

    def parameters(self, form: LowRank, shape: LayerShape) -> int:
        return form.rank * (shape.d_out + shape.d_in)

    def rank_limit(self, shape: LayerShape) -> int:
        return min(shape)

    def decompose(self, form: LowRank, source: Source) -> Truncation:
        if (adapter := source.split_by(form)) is not None:
            return self._split(form.rank, adapter, source)
        k, narrow, C = _kept(form, source), source.narrow, None if form.adapts else source.covariance
        if C is not None and narrow is not None:
            return stacked_truncation(weighted_product, *source.factors(narrow), C, rank=k)
        if C is not None:
            return stacked_truncation(weighted_truncation, source.matrix(), C, rank=k)
        if narrow is not None:
            return stacked_truncation(truncated_product, *source.factors(narrow), rank=k)
        return stacked_truncation(truncated_svd, source.matrix(), rank=k)

    def _split(self, rank: int, adapter: Adapter, source: Source) -> Truncation:
        """The new product of an adapter ``base + s L R`` of rank r: the top singular directions of ``s L R``, all of
        them and the base's top ``rank - r`` where the rank grows, in descending order. ``error`` is that of ``s L R``.

        From QR of both factors and an r x r matrix; of the base, where the rank grows, from its truncated SVD."""
        L, R = source.factors(adapter)
        product = stacked_truncation(truncated_product, L * adapter.scaling, R, rank=min(rank, adapter.rank))
        if rank <= adapter.rank:
            return product
        base = source.layout.matrix(source.tensors()["base"])
        return joined(product, stacked_truncation(truncated_svd, base, rank=rank - adapter.rank))

    def parts(self, form: LowRank, source: Source) -> tuple[tuple[int, ...], ...]:
        """Of a :class:`hf_drt.linalg.Truncation`."""
        (d_out, d_in), k, batch_shape = source.shape, _kept(form, source), source.shape.batch_shape
        return (*batch_shape, d_out, k), (*batch_shape, k), (*batch_shape, k, d_in), ()

    def start(
        self, form: LowRank, parts: tuple[Tensor, ...], generator: torch.Generator | None, scaling: float
    ) -> Sequence[Tensor]:
        """1 / scaling is spread over both factors, so that they stay balanced."""
        U, S, Vh, error = parts
        L, R = of_each(spectral_factors, Truncation(U, S, Vh, error), form.rank, generator)
        return R / scaling**0.5, L / scaling**0.5

    def factors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        R, L = tensors
        return L, R

    def linear(self, x: Tensor, tensors: Sequence[Tensor], bias: Tensor | None = None) -> Tensor:
        R, L = tensors
        return F.linear(narrow(F.linear, x, R), L, bias)

    def added_linear(self, y: Tensor, x: Tensor, tensors: Sequence[Tensor], scale: float) -> Tensor:
        """One product that adds and scales: the sum of two outputs would be a third pass over memory of their size."""
        R, L = tensors
        low = F.linear(x, R).reshape(-1, R.shape[0])
        return torch.addmm(y.reshape(-1, y.shape[-1]), low, L.mT, alpha=scale).reshape(y.shape)

    def convolution(self, x: Tensor, tensors: Sequence[Tensor], layer: Convolution, bias: Tensor | None) -> Tensor:
        R, L = tensors
        low = narrow(layer.convolve, x, R.view(R.shape[0], layer.in_channels, *layer.kernel_size))
        return layer.pointwise(low, L, bias)


def _kept(form: LowRank, source: Source) -> int:
    """Singular values to keep: a layer that is factored has no more than its rank."""
    narrow = source.narrow
    return form.rank if narrow is None else min(form.rank, narrow.rank)
