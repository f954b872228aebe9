"""One linear map, several parametrizations: Dense | Factored | Adapter."""

from hf_drt.forms.conversion import Conversion
from hf_drt.forms.convert import check, convert, decompose, decomposition_shapes, empty_like, prepare
from hf_drt.forms.modules import (
    AdapterLinear,
    FactoredLinear,
    LowRankLinear,
    as_matrix,
    effective_weight,
    form_of,
    is_transposed,
    tensor_shapes,
    trainable_weights,
    weight_shape,
)
from hf_drt.forms.resolve import break_even_rank, resolve_form, resolve_rank
from hf_drt.forms.specs import Adapter, Dense, Factored, Form, form_from_dict, form_to_dict
from hf_drt.forms.stack import ExpertStack, attach, dense_key, layer_of, place_of, stack_count, stored_transposed
from hf_drt.forms.stack_modules import AdapterStack, FactoredStack

__all__ = [
    "Adapter",
    "AdapterLinear",
    "AdapterStack",
    "Conversion",
    "Dense",
    "ExpertStack",
    "Factored",
    "FactoredLinear",
    "FactoredStack",
    "Form",
    "LowRankLinear",
    "as_matrix",
    "attach",
    "break_even_rank",
    "check",
    "convert",
    "decompose",
    "decomposition_shapes",
    "dense_key",
    "effective_weight",
    "empty_like",
    "form_from_dict",
    "form_of",
    "form_to_dict",
    "is_transposed",
    "layer_of",
    "place_of",
    "prepare",
    "resolve_form",
    "resolve_rank",
    "stack_count",
    "stored_transposed",
    "tensor_shapes",
    "trainable_weights",
    "weight_shape",
]
