"""Conversion of one layer between forms: value-preserving, up to the truncation that a smaller rank forces.

A conversion is prepared first and committed after, so that a failure in one layer leaves every layer as it was.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from hf_drt.forms.conversion import Conversion, Merge
from hf_drt.forms.convolution import AdapterConv, FactoredConv
from hf_drt.forms.frozen import FrozenLinear
from hf_drt.forms.kept import BASE, SCALE
from hf_drt.forms.layout import LayerShape
from hf_drt.forms.marks import FROZEN
from hf_drt.forms.modules import (
    AdapterLinear,
    FactoredLinear,
    FormedLinear,
    LowRankLinear,
    effective_weight,
    form_of,
    frozen_with,
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


def decompose(module: nn.Module, form: Form, covariance: Tensor | None = None) -> tuple[Tensor, ...] | None:
    """What a conversion to ``form`` needs of the layer's decomposition, or None: the one expensive part of
    :func:`prepare`.

    What it is, the product tells (:meth:`hf_drt.forms.Product.decompose`); last comes the relative Frobenius error. Of
    fused experts each is decomposed for itself, and all parts but the error get a leading dimension E.

    Args:
        covariance: Second moments ``(in, in)`` of the layer's inputs, for a change of form that
            :func:`hf_drt.forms.weighs_inputs` tells of: the error that is small, and is given, is then that of the
            layer's outputs. Of a change that does not weigh them they have no effect.
    """
    return form.product.decompose(form, _source(module, covariance)) if _needs_parts(form) else None


def decomposition_shapes(module: nn.Module, form: Form) -> tuple[tuple[int, ...], ...] | None:
    """Shapes of the parts of :func:`decompose`'s result, or None where the form needs none."""
    return form.product.parts(form, _source(module)) if _needs_parts(form) else None


def _needs_parts(form: Form) -> TypeGuard[Factored | Adapter]:
    return isinstance(form, Factored) or (isinstance(form, Adapter) and form.init != "zero")


def _source(module: nn.Module, covariance: Tensor | None = None) -> Source:
    matrix, tensors = partial(effective_weight, module), partial(working_tensors, module)
    return Source(form_of(module), weight_shape(module), layout_of(module), matrix, tensors, covariance)


def prepare(
    module: nn.Module, form: Form, generator: torch.Generator | None = None, parts: tuple[Tensor, ...] | None = None
) -> Conversion:
    """The conversion of a layer to ``form``; nothing changes before its ``commit()``.

    The same form again is a restart: Factored re-balances its factors, Adapter merges and starts a new adapter (ReLoRA,
    Lialin et al. 2023) or balances the one that is only ever split, Dense is returned as it is, frozen or not.

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
            case Dense(frozen=True):
                conversion = _to_frozen(module, form)
            case Dense():
                conversion = _to_dense(module)
            case Factored():
                conversion = _to_factored(module, form, generator, parts or ())
            case Adapter():
                conversion = _to_adapter(module, form, generator, parts)
    if frozen_by_user(module):  # it stays so
        conversion.trainable += [(weight, False) for weight in trainable_weights(conversion.module)]
    return conversion


def empty_like(module: nn.Module, form: Form) -> nn.Module:
    """A layer in ``form`` with the shapes, dtype, device and bias of ``module`` and with unset values, for loading."""
    check_rank(module, form)
    like, dtype = _like(module)
    dense = _dense_module(module)
    shapes = tensor_shapes(form, weight_shape(module), layout_of(module))

    def empty(*shape: int, kept: torch.dtype = dtype, trainable: bool = True) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=kept, device=like.device), requires_grad=trainable)

    match form:
        case Dense(frozen=True):
            kept = _stored_dtype(form, dtype)
            return _frozen_layer(module, form, empty(*shapes["weight"], kept=kept, trainable=False), dtype)
        case Dense():
            return with_weight(dense, empty(*shapes["weight"]), _bias(module), module.training)
        case Factored() | Adapter():
            frozen = {SCALE: torch.float32}
            frozen |= {BASE: _stored_dtype(form, dtype)} if isinstance(form, Adapter) else {}
            tensors = {
                name: empty(*size, kept=frozen.get(name, dtype), trainable=name not in frozen)
                for name, size in shapes.items()
            }
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
    layout = layout_of(module)
    if not isinstance(form, Factored) and form.dtype is not None and (layout.kernel or layout.count is not None):
        raise ValueError(
            f"{form} is a form of linear layers, and of no convolution or experts. Use {replace(form, dtype=None)}."
        )
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
    return module.shell if isinstance(module, FormedLinear) else module


def _bias(module: nn.Module) -> nn.Parameter | None:
    return module._parameters.get("bias")


def _like(module: nn.Module) -> tuple[Tensor, torch.dtype]:
    """A tensor of the layer's W, and the dtype in which that is trained."""
    like = next(p for name, p in module.named_parameters() if name != "bias")
    return like, trained_dtype(module)


def trained_dtype(module: nn.Module) -> torch.dtype:
    """That in which a layer's W is trained: of a frozen one, in which it would be."""
    return module.dtype if isinstance(module, FrozenLinear) else trainable_weights(module)[0].dtype


def _to_dense(module: nn.Module) -> Conversion:
    if form_of(module) == Dense():
        return Conversion(module, 0.0)
    weight, merge = _whole_weight(module)
    dense = _dense_module(module)
    return Conversion(with_weight(dense, weight, _bias(module), module.training), 0.0, merge, [(weight, True)])


def _to_frozen(module: nn.Module, form: Dense) -> Conversion:
    if form_of(module) == form:
        return Conversion(module, 0.0)
    weight, merge = _whole_weight(module, form)
    return Conversion(_frozen_layer(module, form, weight, _like(module)[1]), 0.0, merge, [(weight, False)])


def _whole_weight(
    module: nn.Module,
    form: Dense | Adapter = Dense(),  # noqa: B008
) -> tuple[nn.Parameter, Merge | None]:
    """The Parameter that holds W whole, as the form keeps it, and what has to be merged into it: the old W's object
    wherever one exists."""
    like, dtype = _like(module)
    stored = _stored_dtype(form, dtype)
    match module:
        case AdapterLinear(base=base) if stored == base.dtype:
            return base, Merge(base, lambda: effective_weight(module), module)
        case LowRankLinear():
            W = _unformed(like, stored)
            return W, Merge(W, lambda: effective_weight(module), module)
    weight = trainable_weights(module)[0]
    if weight.dtype == stored:  # never of int8
        return weight, None
    W = _unformed(like, stored)
    return W, Merge(W, lambda: effective_weight(module), None)


def _stored_dtype(form: Dense | Adapter, dtype: torch.dtype) -> torch.dtype:
    """In which a form keeps a W, or an adapter's base, that is trained in ``dtype``."""
    return dtype if form.dtype is None else getattr(torch, form.dtype)


def _frozen_layer(module: nn.Module, form: Dense, weight: nn.Parameter, dtype: torch.dtype) -> nn.Module:
    """A layer of frozen W: a dense one, or where W is of another dtype than the layer computes in, one that widens
    it."""
    dense, bias, by_user = _dense_module(module), _bias(module), frozen_by_user(module)
    if form.dtype is None:
        return frozen_with(dense, weight, bias, module.training, by_user)
    frozen = FrozenLinear(dense, form, weight, bias, dtype, by_user)
    frozen.training = module.training
    return frozen


def frozen_by_user(module: nn.Module) -> bool:
    """Whether a layer is frozen by its user, and so in every form; not by its form alone."""
    if isinstance(module, FrozenLinear):
        return module.by_user
    return vars(module).get(FROZEN, not any(weight.requires_grad for weight in trainable_weights(module)))


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
    base, merge = _whole_weight(module, form)
    frozen = {BASE: base} | _scale(module, form)
    tensors = frozen | _product_tensors(module, form, generator, parts)
    adapter = low_rank_layer(_dense_module(module), form, tensors, _bias(module))
    adapter.training = module.training
    source = merge.source if merge is not None else None
    if parts is not None:  # the base is what the new adapter, of principal directions, leaves of W
        merge = Merge(base, lambda: _without(module, adapter), source)
    if merge is not None and SCALE in frozen:
        merge = replace(merge, scale=frozen[SCALE])
    return Conversion(adapter, 0.0, merge, [(weight, False) for weight in frozen.values()])


def _scale(module: nn.Module, form: Adapter) -> dict[str, nn.Parameter]:
    """The Parameter of the scales beside a base in int8, by name: that of the old layer where it has one."""
    if form.dtype != "int8":
        return {}
    now = module.kept_scale if isinstance(module, AdapterLinear) else None
    return {SCALE: _unformed(_like(module)[0], torch.float32) if now is None else now}


def _product_tensors(
    module: nn.Module, form: Factored | Adapter, generator: torch.Generator | None, parts: tuple[Tensor, ...] | None
) -> dict[str, nn.Parameter]:
    """The product's tensors at its start, by name: from a decomposition, or with a product of zero where it is None."""
    like, dtype = _like(module)
    product, shape = form.product, weight_shape(module)
    if parts is None:
        values = product.start_at_zero(form, shape, generator)
    else:
        values = product.start(form, parts, generator, form.scaling)
    stored = product.shapes(form, shape)
    by_name = dict(zip((name for name in product.names(form.adapts) if name in stored), values, strict=True))
    values = {name: by_name[name].to(dtype=dtype, device=like.device).contiguous() for name in stored}
    return {name: nn.Parameter(value) for name, value in values.items()}


def _without(module: nn.Module, adapter: LowRankLinear) -> Tensor:
    """The old effective W minus the new adapter's product, as cast: so the base takes up what the cast has cost."""
    tensors = adapter.product.ordered(adapter.form, working_tensors(adapter))
    return adapter.product.added(effective_weight(module), tensors, -adapter.form.scaling)


def _unformed(like: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A Parameter of no elements, to be filled by a :class:`Merge`."""
    return nn.Parameter(like.new_empty(0, dtype=dtype), requires_grad=dtype.is_floating_point)
