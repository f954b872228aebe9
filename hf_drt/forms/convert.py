"""Conversion of one layer between forms: value-preserving, up to the truncation that a smaller rank forces.

A conversion is prepared first and committed after, so that a failure in one layer leaves every layer as it was.
"""

import math

import torch
from torch import Tensor, nn

from hf_drt.forms.conversion import Conversion, Merge
from hf_drt.forms.convolution import AdapterConv, FactoredConv
from hf_drt.forms.modules import (
    AdapterLinear,
    FactoredLinear,
    LowRankLinear,
    effective_weight,
    form_of,
    kaiming_rows,
    layout_of,
    trainable_weights,
    weight_shape,
    with_weight,
    working_tensors,
)
from hf_drt.forms.plain import own_behaviour
from hf_drt.forms.specs import Adapter, Dense, Factored, Form
from hf_drt.forms.stack_math import of_each, random_rows, stacked_truncation
from hf_drt.forms.stack_modules import AdapterStack, FactoredStack
from hf_drt.forms.structures import halves, plus_product, tensor_shapes
from hf_drt.linalg import Truncation, balanced, cp, cp_limit, equal_norms, truncated_product, truncated_svd, tucker2


def convert(module: nn.Module, form: Form, generator: torch.Generator | None = None) -> Conversion:
    """The layer in another form (:func:`prepare`), in force at once. The old module must not be used any more.

    Raises:
        ValueError: As there, or the layer does more than its class does (:mod:`hf_drt.forms.plain`), which its new form
            would not.
    """
    check_rank(module, form)
    reason = own_behaviour(module)
    if reason is not None and not (form_of(module) == form == Dense()):
        raise ValueError(
            f"a {type(module).__name__} of shape (out, in) = {weight_shape(module)} cannot change form: {reason}. Its "
            "new form would give x W^T + b alone. Take off what it does beside that, or leave the layer as it is."
        )
    conversion = prepare(module, form, generator)
    conversion.commit()
    return conversion


def decompose(module: nn.Module, form: Form) -> tuple[Tensor, ...] | None:
    """What a conversion to ``form`` needs of the layer's decomposition, or None: the one expensive part of
    :func:`prepare`.

    For 'svd' a :class:`hf_drt.linalg.Truncation` of rank min(form.rank, rank of the layer's own factors); a layer
    that is factored by it is decomposed by QR and an r x r matrix. Of fused experts each is decomposed for itself, and
    all parts but the error get a leading dimension E. For 'tucker' and 'cp' the factors, in the order of
    :func:`hf_drt.forms.tensor_shapes`, and the relative Frobenius error.
    """
    shapes = decomposition_shapes(module, form)
    if shapes is None:
        return None
    layout = layout_of(module)
    match form.decomposition:
        case "tucker":
            return tucker2(layout.stored(effective_weight(module)), form.rank, form.rank_in)
        case "cp" if module_is_of(module, form):  # a restart, which least squares would move
            into, *axes, out = (tensor for tensor in working_tensors(module).values())
            out, *rest = equal_norms([out.mT, into, *axes])
            return *rest, out.mT.contiguous(), out.new_zeros(())
        case "cp":
            return cp(layout.stored(effective_weight(module)), form.rank)
    k = shapes[0][-1]
    if isinstance(module, FactoredLinear):
        return stacked_truncation(truncated_product, *halves(module.form, working_tensors(module)), rank=k)
    return stacked_truncation(truncated_svd, effective_weight(module), rank=k)


def module_is_of(module: nn.Module, form: Form) -> bool:
    """Whether the layer is in exactly this factored form already."""
    return isinstance(module, FactoredLinear) and module.form == form


def decomposition_shapes(module: nn.Module, form: Form) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of the parts of :func:`decompose`'s result, or None where the form needs none."""
    if not (isinstance(form, Factored) or (isinstance(form, Adapter) and form.init == "principal")):
        return None
    out, into = weight_shape(module)
    if form.decomposition != "svd":
        factors = Factored(form.rank, form.decomposition, form.rank_in)
        return *tensor_shapes(factors, (out, into), layout_of(module)).values(), ()
    k = min(form.rank, module.form.rank) if isinstance(module, FactoredLinear) else form.rank
    lead = layout_of(module).lead
    return (*lead, out, k), (*lead, k), (*lead, k, into), ()


def prepare(
    module: nn.Module, form: Form, generator: torch.Generator | None = None, parts: tuple[Tensor, ...] | None = None
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
        ValueError: The rank exceeds :func:`rank_limit`, or the weight holds inf or nan.
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
    check_rank(module, form)
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
        ValueError: The rank exceeds :func:`rank_limit`, or the weight holds inf or nan.
    """
    check_rank(module, form)
    for name, parameter in module.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        if name != "bias" and not torch.isfinite(local).all():
            raise ValueError(
                f"{name} of a layer of shape (out, in) = {weight_shape(module)} holds inf or nan. The training has "
                "diverged: lower the learning rate, or go back to an earlier checkpoint."
            )


def check_rank(module: nn.Module, form: Form) -> None:
    """Whether the layer has this form.

    Raises:
        TypeError: ``form`` is none.
        ValueError: The layer has no low-rank form, or not with this decomposition, or the rank exceeds
            :func:`rank_limit`.
    """
    if not isinstance(form, Form):
        raise TypeError(f"{form!r} is no form; allowed are Dense(), Factored(rank) and Adapter(rank, alpha, init).")
    shape, layout = weight_shape(module), layout_of(module)
    if getattr(module, "groups", 1) != 1 or isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise ValueError(f"a {module} has no low-rank form: only convolutions with groups=1 have, and no transposed.")
    if isinstance(form, Dense):
        return
    if form.decomposition != "svd" and not layout.kernel:
        raise ValueError(
            f"decomposition '{form.decomposition}' is of convolutions only, and the layer is linear, of shape "
            f"(out, in) = {shape}. Use 'svd'."
        )
    limit = rank_limit(form, shape)
    if not 1 <= form.rank <= limit:
        raise ValueError(f"rank must lie in 1..{limit} for a layer of shape (out, in) = {shape}, got {form.rank}.")
    if form.rank_in is not None and form.rank_in > shape.channels:
        raise ValueError(
            f"rank_in must lie in 1..{shape.channels} for a convolution of as many input channels, got {form.rank_in}."
        )


def rank_limit(form: Factored | Adapter, shape: tuple[int, int]) -> int:
    """The largest rank of a layer of shape ``(out, in)``: from there on every W is met exactly."""
    match form.decomposition:
        case "tucker":
            return shape[0]
        case "cp":
            return cp_limit((shape[0], shape.channels, *shape.kernel))
    return min(shape)


def low_rank_layer(
    dense: nn.Module, form: Factored | Adapter, tensors: dict[str, nn.Parameter], bias: nn.Parameter | None
) -> LowRankLinear:
    """The module of a low-rank form of ``dense``, with tensors as :func:`tensor_shapes` names them."""
    factored, layout = isinstance(form, Factored), layout_of(dense)
    if layout.kernel:
        cls = FactoredConv if factored else AdapterConv
    elif layout.count is not None:
        cls = FactoredStack if factored else AdapterStack
    else:
        cls = FactoredLinear if factored else AdapterLinear
    return cls(dense, form, tensors, bias)


def _dense_module(module: nn.Module) -> nn.Module:
    return module._shell[0] if isinstance(module, LowRankLinear) else module


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(dtype=like.dtype, device=like.device).contiguous())


def _to_dense(module: nn.Module) -> Conversion:
    match module:
        case FactoredLinear():
            W = _unformed(trainable_weights(module)[0])
            return Conversion(module.dense_with(W), 0.0, Merge(W, lambda: effective_weight(module), module))
        case AdapterLinear(base=base):
            merge = Merge(base, lambda: effective_weight(module), module)
            return Conversion(module.dense_with(base), 0.0, merge, [(base, True)])
    return Conversion(module, 0.0)


def _to_factored(
    module: nn.Module, form: Factored, generator: torch.Generator | None, parts: tuple[Tensor, ...]
) -> Conversion:
    factored = low_rank_layer(_dense_module(module), form, _factors(module, form, generator, parts), module.bias)
    factored.training = module.training
    return Conversion(factored, parts[-1].item())


def _to_adapter(
    module: nn.Module, form: Adapter, generator: torch.Generator | None, parts: tuple[Tensor, ...] | None
) -> Conversion:
    base = _future_base(module)
    tensors = {"base": base} | _factors(module, form, generator, parts)
    adapter = low_rank_layer(_dense_module(module), form, tensors, module.bias)
    adapter.training = module.training
    return Conversion(adapter, 0.0, _base_merge(module, adapter, parts is not None), [(base, False)])


def _factors(
    module: nn.Module, form: Factored | Adapter, generator: torch.Generator | None, parts: tuple[Tensor, ...] | None
) -> dict[str, nn.Parameter]:
    """The product's tensors at its start, by name: from a decomposition, or with a product of zero where it is None."""
    like = next(p for name, p in module.named_parameters() if name != "bias")
    layout = layout_of(module)
    sizes = tensor_shapes(form, weight_shape(module), layout)
    sizes.pop("base", None)
    scaling = form.scaling if isinstance(form, Adapter) else 1.0
    if parts is None:
        *rest, out = sizes.items()
        rows = {name: size[len(layout.lead) :] for name, size in rest}
        values = {
            name: random_rows(layout.lead, size[0], math.prod(size[1:]), generator).reshape(*layout.lead, *size)
            for name, size in rows.items()
        }
        values[out[0]] = torch.zeros(out[1])
    elif form.decomposition == "svd":
        # 1 / scaling is spread over both factors, so that they stay balanced.
        sides = of_each(spectral_factors, Truncation(*parts), form.rank, generator)
        L, R = (factor / scaling**0.5 for factor in sides)
        values = dict(zip(sizes, (L, R) if isinstance(form, Factored) else (R, L), strict=True))
    else:
        *rest, out = parts[:-1]
        rest = _without_dead(rest, generator) if form.decomposition == "cp" else rest
        values = dict(zip(sizes, (*rest, out / scaling), strict=True))
    return {name: _parameter(value, like) for name, value in values.items()}


def _without_dead(factors: list[Tensor], generator: torch.Generator | None) -> list[Tensor]:
    """Random rows where a component of a CP decomposition is zero, or it could never learn; its output stays zero."""
    return [
        torch.where(
            factor.any(dim=1, keepdim=True), factor, kaiming_rows(len(factor), factor.shape[1], generator).to(factor)
        )
        for factor in factors
    ]


def _future_base(module: nn.Module) -> nn.Parameter:
    """The Parameter that becomes the adapter's base: the old W's object wherever one exists."""
    match module:
        case FactoredLinear():
            return _unformed(trainable_weights(module)[0])
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
    return plus_product(W, L, R, -adapter.form.scaling)


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
