"""One linear map, several parametrizations: Dense | Factored | Adapter, and what their products are."""

from hf_drt.forms.attention import PROJECTIONS, SplitAttention, is_projection, packed_parameters, split_attentions
from hf_drt.forms.bottleneck import keep_bottlenecks
from hf_drt.forms.conversion import Conversion, rounding
from hf_drt.forms.convert import (
    check,
    check_rank,
    convert,
    decompose,
    decomposition_shapes,
    empty_like,
    frozen_by_user,
    prepare,
    rank_limit,
    trained_dtype,
)
from hf_drt.forms.frozen import FrozenLinear
from hf_drt.forms.kept import check_quantizer, decomposed_dtype, in_one_dtype
from hf_drt.forms.layer_rank import layer_rank, layer_ranks
from hf_drt.forms.layout import LayerShape, Layout, is_transposed
from hf_drt.forms.marks import FROZEN, SHOWN
from hf_drt.forms.modules import (
    AdapterLinear,
    FactoredLinear,
    FormedLinear,
    LowRankLinear,
    effective_weight,
    form_of,
    layout_of,
    trainable_weights,
    weight_shape,
)
from hf_drt.forms.plain import accept, odd_tensors, own_behaviour
from hf_drt.forms.products import KernelProduct, Product, Source, TwoFactors, product_table, tensor_names
from hf_drt.forms.specs import (
    Adapter,
    Dense,
    Factored,
    Form,
    begins_anew,
    flops_of,
    form_from_dict,
    form_to_dict,
    forward_of,
    parameters_of,
    product_for,
)
from hf_drt.forms.stack import (
    LEAVES,
    ExpertStack,
    attach,
    dense_key,
    layer_of,
    place_of,
    stack_count,
    stored_transposed,
)
from hf_drt.forms.stack_modules import AdapterStack, FactoredStack
from hf_drt.forms.stack_weight import StackWeight
from hf_drt.forms.structures import factors, frozen_names, merged, tensor_shapes
from hf_drt.forms.weighing import weighs_inputs
from hf_drt.registry import PRODUCTS

__all__ = [
    "FROZEN",
    "LEAVES",
    "PRODUCTS",
    "PROJECTIONS",
    "SHOWN",
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
    "FormedLinear",
    "FrozenLinear",
    "KernelProduct",
    "LayerShape",
    "Layout",
    "LowRankLinear",
    "Product",
    "Source",
    "SplitAttention",
    "StackWeight",
    "TwoFactors",
    "accept",
    "attach",
    "begins_anew",
    "check",
    "check_quantizer",
    "check_rank",
    "convert",
    "decompose",
    "decomposed_dtype",
    "decomposition_shapes",
    "dense_key",
    "effective_weight",
    "empty_like",
    "factors",
    "flops_of",
    "form_from_dict",
    "form_of",
    "form_to_dict",
    "forward_of",
    "frozen_by_user",
    "frozen_names",
    "in_one_dtype",
    "is_projection",
    "is_transposed",
    "keep_bottlenecks",
    "layer_of",
    "layer_rank",
    "layer_ranks",
    "layout_of",
    "merged",
    "odd_tensors",
    "own_behaviour",
    "packed_parameters",
    "parameters_of",
    "place_of",
    "prepare",
    "product_for",
    "product_table",
    "rank_limit",
    "rounding",
    "split_attentions",
    "stack_count",
    "stored_transposed",
    "tensor_names",
    "tensor_shapes",
    "trainable_weights",
    "trained_dtype",
    "weighs_inputs",
    "weight_shape",
]
