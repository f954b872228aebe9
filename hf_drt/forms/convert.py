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
    kaiming_rows,
    layout_of,
    low_rank_layer,
    trainable_weights,
    weight_shape,
    with_weight,
    working_tensors,
)
from hf_drt.forms.specs import Adapter, Dense, Factored, Form
from hf_drt.forms.structures import halves, tensor_shapes
from hf_drt.truncation import Truncation, balanced, truncated_product, truncated_svd


def convert(module: nn.Module, form: Form, generator: torch.Generator | None = None) -> Conversion:
    """The layer in another form (:func:`prepare`), in force at once. The old module must not be used any more."""
    conversion = prepare(module, form, generator)
    conversion.commit()
    return conversion


def decompose(module: nn.Module, form: Form) -> Truncation | None:
    """What a conversion to ``form`` needs of the layer's SVD, or None: the one expensive part of :func:`prepare`.

    ``U (out, k)``, ``S (k,)`` and ``Vh (k, in)`` with k = min(form.rank, rank of the layer's own factors), and the
    truncation's error. A factored layer is decomposed by QR and an r x r matrix.
    """
    shapes = decomposition_shapes(module, form)
    if shapes is None:
        return None
    k = shapes[0][1]
    if isinstance(module, FactoredLinear):
        return truncated_product(module.U, module.V, k)
    return truncated_svd(effective_weight(module), k)


def decomposition_shapes(module: nn.Module, form: Form) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of the parts of :func:`decompose`'s result, or None where the form needs none."""
    if not (isinstance(form, Factored) or (isinstance(form, Adapter) and form.init == "principal")):
        return None
    out, into = weight_shape(module)
    k = min(form.rank, module.form.rank) if isinstance(module, FactoredLinear) else form.rank
    return (out, k), (k,), (k, into), ()


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
    like = next(p for name, p in module.named_parameters() if name != "bias")
    dense = _dense_module(module)
    shapes = tensor_shapes(form, weight_shape(module), layout_of(module))

    def empty(*shape: int, trainable: bool = True) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device), requires_grad=trainable)

    match form:
        case Dense():
            return with_weight(dense, empty(*shapes["weight"]), module.bias, module.training)
        case Factored() | Adapter():
            tensors = {name: empty(*size, trainable=name != "base") for name, size in shapes.items()}
            return low_rank_layer(dense, form, tensors, module.bias)


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
    U, V = spectral_factors(parts, form.rank, generator)
    like = next(p for name, p in module.named_parameters() if name != "bias")
    dense = _dense_module(module)
    factored = low_rank_layer(dense, form, {"U": _parameter(U, like), "V": _parameter(V, like)}, module.bias)
    factored.training = module.training
    return Conversion(factored, parts.error.item())


def _to_adapter(
    module: nn.Module, form: Adapter, generator: torch.Generator | None, parts: Truncation | None
) -> Conversion:
    out, into = weight_shape(module)
    like = next(p for name, p in module.named_parameters() if name != "bias")
    if parts is not None:
        # 1 / scaling is spread over both factors, so that they stay balanced.
        L, A = (factor / form.scaling**0.5 for factor in spectral_factors(parts, form.rank, generator))
    else:
        L, A = torch.zeros(out, form.rank), kaiming_rows(form.rank, into, generator)
    base = _future_base(module)
    tensors = {"base": base, "lora_A": _parameter(A, like), "lora_B": _parameter(L, like)}
    adapter = low_rank_layer(_dense_module(module), form, tensors, module.bias)
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
    L, R = halves(adapter.form, working_tensors(adapter))
    return torch.addmm(W, L, R, alpha=-adapter.form.scaling)


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
