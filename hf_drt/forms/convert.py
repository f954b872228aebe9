"""Conversion of one layer between forms: value-preserving, up to the truncation that a smaller rank forces.

A conversion is prepared first and committed after, so that a failure in one layer leaves every layer as it was.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from hf_drt.forms.conversion import Conversion, Merge
from hf_drt.forms.convolution import AdapterConv, FactoredConv
from hf_drt.forms.layout import LayerShape
from hf_drt.forms.modules import (
    AdapterLinear,
    FactoredLinear,
    LowRankLinear,
    effective_weight,
    form_of,
    layout_of,
    trainable_weights,
    weight_shape,
    with_weight,
    working_tensors,
)
from hf_drt.forms.plain import own_behaviour
from hf_drt.forms.products import Source
from hf_drt.forms.specs import DEFAULT_PRODUCT, Adapter, Dense, Factored, Form
from hf_drt.forms.stack_modules import AdapterStack, FactoredStack
from hf_drt.forms.structures import tensor_shapes


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

    What it is, the product tells (:meth:`hf_drt.forms.Product.decompose`); last comes the relative Frobenius error. Of
    fused experts each is decomposed for itself, and all parts but the error get a leading dimension E.
    """
    return form.product.decompose(form, _source(module)) if _needs_parts(form) else None


def decomposition_shapes(module: nn.Module, form: Form) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of the parts of :func:`decompose`'s result, or None where the form needs none."""
    return form.product.parts(form, _source(module)) if _needs_parts(form) else None


def _needs_parts(form: Form) -> TypeGuard[Factored | Adapter]:
    return isinstance(form, Factored) or (isinstance(form, Adapter) and form.init == "principal")


def _source(module: nn.Module) -> Source:
    matrix, tensors = partial(effective_weight, module), partial(working_tensors, module)
    return Source(form_of(module), weight_shape(module), layout_of(module), matrix, tensors)


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
                conversion = _to_factored(module, form, generator, parts or ())
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
            return with_weight(dense, empty(*shapes["weight"]), _bias(module), module.training)
        case Factored() | Adapter():
            tensors = {name: empty(*size, trainable=name != "base") for name, size in shapes.items()}
            return low_rank_layer(dense, form, tensors, _bias(module))


def check(module: nn.Module, form: Form, local: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    """Whether the layer can take the form.

    Args:
        local: What is looked at of a parameter: of a sharded one, the part that this process holds.

    Raises:
        TypeError: ``form`` is not a form.
        ValueError: The rank exceeds :func:`rank_limit`, or the weight holds inf or nan.
    """
    check_rank(module, form)
    for name, parameter in module.named_parameters():
        if name != "bias" and not torch.isfinite(local(parameter)).all():
            raise ValueError(
                f"{name} of a layer of shape (out, in) = {weight_shape(module)} holds inf or nan. The training has "
                "diverged: lower the learning rate, or go back to an earlier checkpoint."
            )


def check_rank(module: nn.Module, form: Form) -> None:
    """Whether the layer has this form.

    Raises:
        TypeError: ``form`` is not a form.
        ValueError: The layer has no low-rank form, or not with this decomposition, or a rank exceeds the largest.
    """
    if not isinstance(form, Form):
        raise TypeError(f"the form must be Dense(), Factored(rank) or Adapter(rank, alpha, init), got {form!r}.")
    if getattr(module, "groups", 1) != 1 or isinstance(module, nn.modules.conv._ConvTransposeNd):
        raise ValueError(f"a {module} has no low-rank form: only convolutions with groups=1 have, and no transposed.")
    if isinstance(form, Dense):
        return
    shape, product = weight_shape(module), form.product
    if reason := product.refusal(shape):
        raise ValueError(f"decomposition '{product.name}' is {reason}. Use '{DEFAULT_PRODUCT}'.")
    limit = rank_limit(form, shape)
    if not 1 <= form.rank <= limit:
        raise ValueError(f"rank must lie in 1..{limit} for a layer of shape (out, in) = {shape}, got {form.rank}.")
    if form.rank_in is not None and form.rank_in > (limit := product.rank_in_limit(shape)):
        raise ValueError(
            f"rank_in must lie in 1..{limit} for a convolution of as many input channels, got {form.rank_in}."
        )


def rank_limit(form: Factored | Adapter, shape: tuple[int, int]) -> int:
    """The largest rank of a layer of shape ``(out, in)``: from there on every W is met exactly."""
    return form.product.rank_limit(LayerShape.of(shape))


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


def _bias(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("bias")


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
    tensors = _product_tensors(module, form, generator, parts)
    factored = low_rank_layer(_dense_module(module), form, tensors, _bias(module))
    factored.training = module.training
    return Conversion(factored, parts[-1].item())


def _to_adapter(
    module: nn.Module, form: Adapter, generator: torch.Generator | None, parts: tuple[Tensor, ...] | None
) -> Conversion:
    base = _future_base(module)
    tensors = {"base": base} | _product_tensors(module, form, generator, parts)
    adapter = low_rank_layer(_dense_module(module), form, tensors, _bias(module))
    adapter.training = module.training
    return Conversion(adapter, 0.0, _base_merge(module, adapter, base, parts is not None), [(base, False)])


def _product_tensors(
    module: nn.Module, form: Factored | Adapter, generator: torch.Generator | None, parts: tuple[Tensor, ...] | None
) -> dict[str, nn.Parameter]:
    """The product's tensors at its start, by name: from a decomposition, or with a product of zero where it is None."""
    like = next(p for name, p in module.named_parameters() if name != "bias")
    product, shape = form.product, weight_shape(module)
    if parts is None:
        values = product.start_at_zero(form, shape, generator)
    else:
        values = product.start(form, parts, generator, form.scaling)
    stored = product.shapes(form, shape)
    by_name = dict(zip((name for name in product.names(form.adapts) if name in stored), values, strict=True))
    return {name: _parameter(by_name[name], like) for name in stored}


def _future_base(module: nn.Module) -> nn.Parameter:
    """The Parameter that becomes the adapter's base: the old W's object wherever one exists."""
    match module:
        case FactoredLinear():
            return _unformed(trainable_weights(module)[0])
        case AdapterLinear():
            return module.base
    return trainable_weights(module)[0]


def _base_merge(module: nn.Module, adapter: LowRankLinear, base: nn.Parameter, principal: bool) -> Merge | None:
    """What has to be merged into the base; nothing where a new adapter of product zero stands on the old W."""
    source = module if isinstance(module, LowRankLinear) else None
    if principal:
        return Merge(base, lambda: _without(module, adapter), source)
    return None if source is None else Merge(base, lambda: effective_weight(module), source)


def _without(module: nn.Module, adapter: LowRankLinear) -> Tensor:
    """The old effective W minus the new adapter's product, as cast: so the base takes up what the cast has cost."""
    tensors = adapter.product.ordered(adapter.form, working_tensors(adapter))
    return adapter.product.added(effective_weight(module), tensors, -adapter.form.scaling)


def _unformed(like: Tensor) -> nn.Parameter:
    """A Parameter of no elements, to be filled by a :class:`Merge`."""
    return nn.Parameter(like.new_empty(0))
