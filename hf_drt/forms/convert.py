"""Conversion of one layer between forms: value-preserving, up to the truncation that a smaller rank forces.

A conversion is prepared first and committed after, so that a failure in one layer leaves every layer as it was.
"""

import torch
from torch import Tensor, nn

from hf_drt.forms.conversion import Conversion, Merge
from hf_drt.forms.modules import (
    AdapterLinear,
    FactoredLinear,
    LowRankLinear,
    effective_weight,
    is_transposed,
    kaiming_rows,
    plus_product,
    trainable_weights,
    weight_shape,
    with_weight,
)
from hf_drt.forms.specs import Adapter, Dense, Factored, Form
from hf_drt.forms.stack import stack_count
from hf_drt.forms.stack_math import of_each, random_rows, stacked_truncation
from hf_drt.forms.stack_modules import stacked_as
from hf_drt.truncation import Truncation, balanced, truncated_product, truncated_svd


def convert(module: nn.Module, form: Form, generator: torch.Generator | None = None) -> Conversion:
    """The layer in another form (:func:`prepare`), in force at once. The old module must not be used any more."""
    conversion = prepare(module, form, generator)
    conversion.commit()
    return conversion


def decompose(module: nn.Module, form: Form) -> Truncation | None:
    """What a conversion to ``form`` needs of the layer's SVD, or None: the one expensive part of :func:`prepare`.

    ``U (out, k)``, ``S (k,)`` and ``Vh (k, in)`` with k = min(form.rank, rank of the layer's own factors), and the
    truncation's error. A factored layer is decomposed by QR and an r x r matrix. Of fused experts each is decomposed
    for itself, and all parts but the error get a leading dimension E.
    """
    shapes = decomposition_shapes(module, form)
    if shapes is None:
        return None
    k = shapes[1][-1]
    if isinstance(module, FactoredLinear):
        return stacked_truncation(truncated_product, module.U, module.V, rank=k)
    return stacked_truncation(truncated_svd, effective_weight(module), rank=k)


def decomposition_shapes(module: nn.Module, form: Form) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of the parts of :func:`decompose`'s result, or None where the form needs none."""
    if not (isinstance(form, Factored) or (isinstance(form, Adapter) and form.init == "principal")):
        return None
    out, into = weight_shape(module)
    k = min(form.rank, module.form.rank) if isinstance(module, FactoredLinear) else form.rank
    lead = _lead(module)
    return (*lead, out, k), (*lead, k), (*lead, k, into), ()


def prepare(
    module: nn.Module, form: Form, generator: torch.Generator | None = None, parts: Truncation | None = None
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
    check(module, form)
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
    _check_rank(module, form)
    out, into = weight_shape(module)
    like = next(p for name, p in module.named_parameters() if name != "bias")
    dense = _dense_module(module)

    def empty(*shape: int, trainable: bool = True) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device), requires_grad=trainable)

    lead = _lead(module)
    stored = (*lead, into, out) if is_transposed(dense) else (*lead, out, into)
    match form:
        case Dense():
            return with_weight(dense, empty(*stored), module.bias, module.training)
        case Factored(rank):
            U, V = empty(*lead, out, rank), empty(*lead, rank, into)
            return stacked_as(dense, FactoredLinear)(dense, form, U, V, module.bias)
        case Adapter(rank):
            base = empty(*stored, trainable=False)
            A, B = empty(*lead, rank, into), empty(*lead, out, rank)
            return stacked_as(dense, AdapterLinear)(dense, form, base, A, B, module.bias)


def check(module: nn.Module, form: Form) -> None:
    """Whether the layer can take the form; of a sharded layer, what this process holds of it.

    Raises:
        TypeError: ``form`` is none.
        ValueError: The rank exceeds min(out, in), or the weight holds inf or nan.
    """
    _check_rank(module, form)
    for name, parameter in module.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if name != "bias" and not torch.isfinite(local).all():
            raise ValueError(
                f"{name} of a layer of shape (out, in) = {weight_shape(module)} holds inf or nan. The training has "
                "diverged: lower the learning rate, or go back to an earlier checkpoint."
            )


def _check_rank(module: nn.Module, form: Form) -> None:
    if not isinstance(form, Form):
        raise TypeError(f"{form!r} is no form; allowed are Dense(), Factored(rank) and Adapter(rank, alpha, init).")
    if isinstance(form, Dense):
        return
    limit = min(weight_shape(module))
    if not 1 <= form.rank <= limit:
        raise ValueError(
            f"rank must lie in 1..{limit} for a layer of shape (out, in) = {weight_shape(module)}, got {form.rank}."
        )


def _lead(module: nn.Module) -> tuple[int, ...]:
    count = stack_count(module)
    return () if count is None else (count,)


def _dense_module(module: nn.Module) -> nn.Module:
    return module._shell[0] if isinstance(module, LowRankLinear) else module


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(dtype=like.dtype, device=like.device).contiguous())


def _to_dense(module: nn.Module) -> Conversion:
    match module:
        case FactoredLinear():
            W = _unformed(module.U)
            return Conversion(module.dense_with(W), 0.0, Merge(W, lambda: effective_weight(module), module))
        case AdapterLinear(base=base):
            merge = Merge(base, lambda: effective_weight(module), module)
            return Conversion(module.dense_with(base), 0.0, merge, [(base, True)])
    return Conversion(module, 0.0)


def _to_factored(module: nn.Module, form: Factored, generator: torch.Generator | None, parts: Truncation) -> Conversion:
    U, V = of_each(spectral_factors, parts, form.rank, generator)
    like = next(p for name, p in module.named_parameters() if name != "bias")
    dense = _dense_module(module)
    factored = stacked_as(dense, FactoredLinear)(dense, form, _parameter(U, like), _parameter(V, like), module.bias)
    factored.training = module.training
    return Conversion(factored, parts.error.item())


def _to_adapter(
    module: nn.Module, form: Adapter, generator: torch.Generator | None, parts: Truncation | None
) -> Conversion:
    out, into = weight_shape(module)
    like = next(p for name, p in module.named_parameters() if name != "bias")
    if parts is not None:
        # 1 / scaling is spread over both factors, so that they stay balanced.
        L, A = (factor / form.scaling**0.5 for factor in of_each(spectral_factors, parts, form.rank, generator))
    else:
        L, A = torch.zeros(*_lead(module), out, form.rank), random_rows(_lead(module), form.rank, into, generator)
    base, dense = _future_base(module), _dense_module(module)
    cls = stacked_as(dense, AdapterLinear)
    adapter = cls(dense, form, base, _parameter(A, like), _parameter(L, like), module.bias)
    adapter.training = module.training
    return Conversion(adapter, 0.0, _base_merge(module, adapter, parts is not None), [(base, False)])


def _future_base(module: nn.Module) -> nn.Parameter:
    """The Parameter that becomes the adapter's base: the old W's object wherever one exists."""
    match module:
        case FactoredLinear():
            return _unformed(module.U)
        case AdapterLinear():
            return module.base
    return module.weight


def _base_merge(module: nn.Module, adapter: AdapterLinear, principal: bool) -> Merge | None:
    """What has to be merged into the base; nothing where a new adapter of product zero stands on the old W."""
    source = module if isinstance(module, LowRankLinear) else None
    if principal:
        return Merge(adapter.base, lambda: _without(module, adapter), source)
    return None if source is None else Merge(adapter.base, lambda: effective_weight(module), source)


def _without(module: nn.Module, adapter: AdapterLinear) -> Tensor:
    """The old effective W minus the new adapter's product, as cast: so the base takes up what the cast has cost."""
    W = effective_weight(module)
    L, R, scale = adapter.pair()
    return plus_product(W, L.detach().to(W.dtype), R.detach().to(W.dtype), -scale)


def _unformed(like: Tensor) -> nn.Parameter:
    """A Parameter of no elements, to be filled by a :class:`Merge`."""
    return nn.Parameter(like.new_empty(0))


def spectral_factors(parts: Truncation, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Balanced factors ``U (m, rank)``, ``V (rank, n)`` of the best rank-``rank`` approximation.

    Where the matrix has fewer than ``rank`` non-zero singular values, both factors of a surplus direction would be
    zero, and so would its gradients for ever. There V gets a random row as long as the smallest kept one, and U a zero
    column: the product is the same and the direction can learn.
    """
    U, V = balanced(parts)
    U, V = _padded(U, rank, dim=1), _padded(V, rank, dim=0)
    threshold = parts.S[0] * torch.finfo(parts.S.dtype).eps * max(U.shape[0], V.shape[1])
    alive = int((parts.S > threshold).sum())
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
