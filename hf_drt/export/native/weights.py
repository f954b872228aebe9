"""Do the weights of a checkpoint hold what its ``config.json`` declares? Answered from the headers of their files."""

from collections import defaultdict
from collections.abc import Sequence

from torch import nn

from hf_drt.checkpoint import AGAIN, CheckpointError, DeclaredLayer, Shapes, stored_shapes
from hf_drt.export.native.names import candidates
from hf_drt.forms import Dense, layout_of, tensor_shapes


def check_weights(files: Sequence[str], layers: Sequence[tuple[DeclaredLayer, nn.Module]], prefix: str) -> None:
    """Compare what safetensors files hold of declared layers with what their forms need.

    Args:
        files: All files of the checkpoint.
        layers: Each declared layer, and the dense module that it replaces.
        prefix: Of the part without a head: saved on its own, it has the configuration of the whole, and its names.

    Raises:
        CheckpointError: A tensor is missing, unexpected or of another shape, or a file is damaged.
    """
    stored = _shapes_by_layer(files)
    for layer, module in layers:
        found = next((stored[name] for name in (layer.name, *candidates(layer.name, prefix)) if name in stored), {})
        _check_layer(layer, found, module)


def _shapes_by_layer(files: Sequence[str]) -> dict[str, Shapes]:
    shapes: dict[str, Shapes] = defaultdict(dict)
    for key, shape in stored_shapes(files, AGAIN).items():
        layer, _, tensor = key.rpartition(".")
        shapes[layer][tensor] = shape
        if len(shape) == 3:  # perhaps the dense weight of fused experts, which has the layer's own name
            shapes[key]["weight"] = shape
    return shapes


def _check_layer(layer: DeclaredLayer, found: Shapes, module: nn.Module) -> None:
    layout = layout_of(module)
    expected: Shapes = dict(tensor_shapes(layer.form, layer.shape, layout))
    if module.bias is not None:
        expected["bias"] = tuple(module.bias.shape)
    missing = [name for name in expected if name not in found]
    if missing and found.get("weight") == tensor_shapes(Dense(), layer.shape, layout)["weight"]:
        raise CheckpointError(
            f"the weights hold {layer.name} in dense form, while config.json declares it as {layer.form}. If all "
            "layers are dense (a dense model had the configuration object of one in low-rank form), delete "
            "quantization_config from config.json."
        )
    if missing:
        raise CheckpointError(
            f"the weights lack {layer.name}.{missing[0]}, which {layer.form} in config.json needs. {AGAIN}"
        )
    for name, shape in found.items():
        if name == "weight" and 0 in shape:  # stops a loader that does not know the format
            continue
        if name not in expected:
            raise CheckpointError(
                f"the weights hold {layer.name}.{name}, which {layer.form} in config.json does not have. {AGAIN}"
            )
        if shape != expected[name]:
            raise CheckpointError(
                f"{layer.name}.{name} has shape {shape} in the weights, where {layer.form} in config.json needs "
                f"{expected[name]}. {AGAIN}"
            )
