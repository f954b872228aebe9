"""A model in any mix of forms as an ordinary dense one."""

from torch import Tensor, nn

from hf_drt.forms import LowRankLinear, as_matrix, effective_weight


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict under the names of the dense model; the model itself stays as it is.

    Low-rank layers are merged in float32 (or better) and cast once. The result loads into the model's original class
    without this package.
    """
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, LowRankLinear):
            continue
        own = [f"{name}.{key}" for key, _ in module.named_parameters() if key != "bias"]
        dtype = state[own[0]].dtype
        for key in own:
            del state[key]
        state[f"{name}.weight"] = as_matrix(effective_weight(module), module.transposed).to(dtype).contiguous()
    return state
