"""Whether a layer that was selected is still there."""

from torch import nn

from hf_drt.engines import whole_size
from hf_drt.forms import LayerShape, layer_of, weight_shape
from hf_drt.targets.selection import is_layer


def present_layer(model: nn.Module, name: str, shape: LayerShape) -> nn.Module:
    """The layer of that name as it is now.

    Args:
        shape: What it had when it was selected.

    Raises:
        ValueError: It is gone, something else has taken its place, or it has lost its weights.
    """
    try:
        module = layer_of(model, name)
    except AttributeError:
        module = None
    if module is None or not is_layer(module) or not weight_shape(module).matches(shape):
        found = "nothing" if module is None else f"a {type(module).__name__}"
        raise ValueError(
            f"the model has {found} where the layer {name} of shape (out, in) = {shape} was. "
            "Build DynamicRank after all other changes to the model."
        )
    if any(weight is not None and whole_size(weight) == 0 for weight in module._parameters.values()):
        raise ValueError(
            f"{name} has lost its weights in a change of form that failed halfway. Start a new process, and resume "
            "from the last checkpoint."
        )
    return module
