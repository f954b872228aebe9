"""Conversion of one layer between forms: value-preserving, up to the truncation that a smaller rank forces.

A conversion is built first and committed after, so that a failure in one layer leaves every layer as it was.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_drt.forms.modules import (
    AdapterLinear,
    FactoredLinear,
    LowRankLinear,
    as_matrix,
    is_transposed,
    kaiming_rows,
    trainable_weights,
    weight_shape,
    with_weight,
)
from hf_drt.forms.specs import Adapter, Dense, Factored, Form
from hf_drt.spectral import SVD, balanced, factored_svd, svd, truncation_error, working_dtype


@dataclass
class Conversion:
    """A layer in its new form, not yet in force.

    Attributes:
        module: The layer in its new form. It may hold Parameter objects of the old layer (bias; W between dense and
            adapter form), whose pending values and ``requires_grad`` are set by :meth:`commit`.
        error: Relative Frobenius error of the effective weight by truncation, ``||W_new - W_old||_F / ||W_old||_F``.
        merge_error: What rounding to the parameter's dtype has cost where factors are merged into W, relative to what
            they add to it: ``||cast(W) - W||_F / ||W - base||_F``, with base = 0 for Factored. About 1e-7 in float32;
            1 where an adapter's update is lost in half precision.
    """

    module: nn.Module
    error: float
    merge_error: float = 0.0
    values: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    trainable: list[tuple[nn.Parameter, bool]] = field(default_factory=list)

    def commit(self) -> nn.Module:
        """Put the pending values in force and return the module."""
        with torch.no_grad():
            for parameter, value in self.values:
                parameter.copy_(value)
        for parameter, flag in self.trainable:
            parameter.requires_grad_(flag)
            parameter.grad = None
        return self.module


def convert(module: nn.Module, form: Form, generator: torch.Generator | None = None) -> Conversion:
    """The layer in another form (:func:`prepare`), in force at once. The old module must not be used any more."""
    conversion = prepare(module, form, generator)
    conversion.commit()
    return conversion


def decompose(module: nn.Module, form: Form) -> SVD | None:
    """What a conversion to ``form`` needs of the layer's SVD, or None: the one expensive part of :func:`prepare`.

    ``U (out, k)`` and ``Vh (k, in)`` with k = min(form.rank, number of singular values), and ``S`` in full. A factored
    layer is decomposed by QR and an r x r SVD.
    """
    shapes = decomposition_shapes(module, form)
    if shapes is None:
        return None
    k = shapes[0][1]
    with torch.no_grad():
        factored = isinstance(module, FactoredLinear)
        U, S, Vh = factored_svd(module.U, module.V) if factored else svd(effective_weight(module))
    return SVD(U[:, :k].contiguous(), S, Vh[:k].contiguous())


def decomposition_shapes(module: nn.Module, form: Form) -> tuple[tuple[int, int], tuple[int], tuple[int, int]] | None:
    """Shapes of the three parts of :func:`decompose`'s result, or None where the form needs none."""
    if not (isinstance(form, Factored) or (isinstance(form, Adapter) and form.init == "principal")):
        return None
    out, into = weight_shape(module)
    values = module.form.rank if isinstance(module, FactoredLinear) else min(out, into)
    k = min(form.rank, values)
    return (out, k), (values,), (k, into)


def prepare(
    module: nn.Module, form: Form, generator: torch.Generator | None = None, parts: SVD | None = None
) -> Conversion:
    """The conversion of a layer to ``form``; nothing changes before its ``commit()``.

    The same form again is a restart: Factored re-balances its factors, Adapter merges and starts a new adapter (ReLoRA,
    Lialin et al. 2023), Dense is returned as it is.

    Args:
        module: ``nn.Linear``, ``Conv1D``, or one of this package's modules.
        form: What the layer shall be.
        generator: CPU generator of new random directions; a fixed seed if None.
        parts: Result of :func:`decompose` for the same arguments, where it is at hand already.

    Raises:
        ValueError: The rank exceeds min(out, in), or the weight holds inf or nan.
    """
    _check(module, form)
    _check_finite(module)
    if parts is None:
        parts = decompose(module, form)
    with torch.no_grad():
        match form:
            case Dense():
                conversion = _to_dense(module)
            case Factored():
                conversion = _to_factored(module, form, generator, parts)
            case Adapter():
                conversion = _to_adapter(module, form, generator, parts)
    if not any(weight.requires_grad for weight in trainable_weights(module)):  # frozen by the user: it stays so
        conversion.trainable += [(weight, False) for weight in trainable_weights(conversion.module)]
    return conversion


def empty_like(module: nn.Module, form: Form) -> nn.Module:
    """A layer in ``form`` with the shapes, dtype, device and bias of ``module`` and with unset values, for loading."""
    _check(module, form)
    out, into = weight_shape(module)
    like = next(p for name, p in module.named_parameters() if name != "bias")
    dense = _dense_module(module)

    def empty(*shape: int, trainable: bool = True) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device), requires_grad=trainable)

    stored = (into, out) if is_transposed(dense) else (out, into)
    match form:
        case Dense():
            return with_weight(dense, empty(*stored), module.bias, module.training)
        case Factored(rank):
            return FactoredLinear(dense, form, empty(out, rank), empty(rank, into), module.bias)
        case Adapter(rank):
            base = empty(*stored, trainable=False)
            return AdapterLinear(dense, form, base, empty(rank, into), empty(out, rank), module.bias)


def effective_weight(module: nn.Module) -> Tensor:
    """``W (out, in)`` of a layer in any form, merged in float32 or better."""
    dtype = working_dtype(next(module.parameters()).dtype)
    match module:
        case FactoredLinear():
            return module.U.detach().to(dtype) @ module.V.detach().to(dtype)
        case AdapterLinear():
            L, R, scale = module.pair()
            base = as_matrix(module.base.detach(), module.transposed).to(dtype)
            return torch.addmm(base, L.detach().to(dtype), R.detach().to(dtype), alpha=scale)
    return as_matrix(module.weight.detach(), is_transposed(module)).to(dtype)


def _check(module: nn.Module, form: Form) -> None:
    if not isinstance(form, Form):
        raise TypeError(f"{form!r} is no form; allowed are Dense(), Factored(rank) and Adapter(rank, alpha, init).")
    if isinstance(form, Dense):
        return
    limit = min(weight_shape(module))
    if not 1 <= form.rank <= limit:
        raise ValueError(
            f"rank must lie in 1..{limit} for a layer of shape (out, in) = {weight_shape(module)}, got {form.rank}."
        )


def _check_finite(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if name != "bias" and not torch.isfinite(parameter).all():
            raise ValueError(
                f"{name} of a layer of shape (out, in) = {weight_shape(module)} holds inf or nan. The training has "
                "diverged: lower the learning rate, or go back to an earlier checkpoint."
            )


def _dense_module(module: nn.Module) -> nn.Module:
    return module._shell[0] if isinstance(module, LowRankLinear) else module


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(dtype=like.dtype, device=like.device).contiguous())


def _merge_error(module: LowRankLinear, merged: Tensor) -> float:
    """See :class:`Conversion`; ``merged`` is the new W in the stored layout, before it is cast."""
    base = module.base.detach().to(merged.dtype) if isinstance(module, AdapterLinear) else torch.zeros_like(merged)
    update = (merged - base).norm()
    rounded = merged.to(next(module.parameters()).dtype).to(merged.dtype)
    return 0.0 if update == 0 else ((rounded - merged).norm() / update).item()


def _to_dense(module: nn.Module) -> Conversion:
    match module:
        case FactoredLinear():
            W = as_matrix(effective_weight(module), module.transposed)
            return Conversion(module.dense_with(_parameter(W, module.U)), 0.0, _merge_error(module, W))
        case AdapterLinear(base=base):
            W = as_matrix(effective_weight(module), module.transposed)
            error = _merge_error(module, W)
            return Conversion(module.dense_with(base), 0.0, error, [(base, W)], [(base, True)])
    return Conversion(module, 0.0)


def _to_factored(module: nn.Module, form: Factored, generator: torch.Generator | None, parts: SVD) -> Conversion:
    U, V = spectral_factors(parts, form.rank, generator)
    like = next(p for name, p in module.named_parameters() if name != "bias")
    dense = _dense_module(module)
    factored = FactoredLinear(dense, form, _parameter(U, like), _parameter(V, like), module.bias)
    factored.training = module.training
    return Conversion(factored, truncation_error(parts.S, form.rank))


def _to_adapter(module: nn.Module, form: Adapter, generator: torch.Generator | None, parts: SVD | None) -> Conversion:
    out, into = weight_shape(module)
    dense, transposed = _dense_module(module), is_transposed(_dense_module(module))
    like = next(p for name, p in module.named_parameters() if name != "bias")
    W = None
    if parts is not None:
        # 1 / scaling is spread over both factors, so that they stay balanced.
        L, A = (factor / form.scaling**0.5 for factor in spectral_factors(parts, form.rank, generator))
        W = torch.addmm(effective_weight(module), L, A, alpha=-form.scaling)
    else:
        A = kaiming_rows(form.rank, into, generator)
        L = torch.zeros(out, form.rank)
        if isinstance(module, LowRankLinear):
            W = effective_weight(module)
    error = _merge_error(module, as_matrix(W, transposed)) if isinstance(module, LowRankLinear) else 0.0
    base, values = _frozen_base(module, W, transposed)
    adapter = AdapterLinear(dense, form, base, _parameter(A, like), _parameter(L, like), module.bias)
    adapter.training = module.training
    return Conversion(adapter, 0.0, error, values, [(base, False)])


def _frozen_base(
    module: nn.Module, W: Tensor | None, transposed: bool
) -> tuple[nn.Parameter, list[tuple[nn.Parameter, Tensor]]]:
    """The Parameter that becomes the adapter's base, and its pending value: the old W's object wherever one exists."""
    if isinstance(module, FactoredLinear):
        return _parameter(as_matrix(W, transposed), module.U), []
    base = module.base if isinstance(module, AdapterLinear) else module.weight
    return base, [] if W is None else [(base, as_matrix(W, transposed))]


def spectral_factors(parts: SVD, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Balanced factors ``U (m, rank)``, ``V (rank, n)`` of the best rank-``rank`` approximation.

    Where the matrix has fewer than ``rank`` non-zero singular values, both factors of a surplus direction would be
    zero, and so would its gradients for ever. There V gets a random row as long as the smallest kept one, and U a zero
    column: the product is the same and the direction can learn.
    """
    kept = min(rank, len(parts.S))
    U, V = balanced(SVD(parts.U[:, :kept], parts.S[:kept], parts.Vh[:kept]))
    U, V = _padded(U, rank, dim=1), _padded(V, rank, dim=0)
    threshold = parts.S[0] * torch.finfo(parts.S.dtype).eps * max(U.shape[0], V.shape[1])
    alive = int((parts.S[:kept] > threshold).sum())
    if alive < rank:
        rows = kaiming_rows(rank - alive, V.shape[1], generator).to(V)
        length = parts.S[alive - 1].sqrt() if alive else rows.new_ones(())
        V[alive:] = rows / rows.norm(dim=1, keepdim=True) * length
        U[:, alive:] = 0
    return U.contiguous(), V.contiguous()


def _padded(tensor: Tensor, rank: int, dim: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = rank
    result = tensor.new_zeros(shape)
    result.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return result
