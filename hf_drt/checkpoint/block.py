"""The block of ``config.json`` that declares low-rank layers, read and checked; :mod:`.declaration` writes it."""

from dataclasses import dataclass
from typing import Any

from hf_drt.checkpoint.declaration import FORMAT_VERSION
from hf_drt.checkpoint.state_file import CheckpointError
from hf_drt.forms import PRODUCTS, Adapter, Factored, LayerShape, form_from_dict

AGAIN = "Save or download the checkpoint again."


@dataclass(frozen=True)
class DeclaredLayer:
    """A low-rank layer of a checkpoint: its name in the model that was saved, ``(out, in)`` and form."""

    name: str
    shape: LayerShape
    form: Factored | Adapter


def read_block(block: dict[str, Any]) -> list[DeclaredLayer]:
    """The layers that a block declares.

    Raises:
        CheckpointError: It is of a newer format, or damaged.
    """
    version, layers = block.get("format_version"), block.get("layers")
    if not isinstance(version, int) or not _is_whole(version) or version < 1:
        raise CheckpointError(f"quantization_config has format_version {version!r}: config.json is damaged. {AGAIN}")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"the checkpoint has native format version {version}; this hf_drt reads 1 to {FORMAT_VERSION}. "
            "Upgrade hf_drt."
        )
    if not isinstance(layers, dict) or not layers:
        raise CheckpointError(
            f"quantization_config declares the layers {layers!r}; allowed is a JSON object of one entry or more. "
            f"config.json is damaged. {AGAIN}"
        )
    return [_read_layer(name, entry) for name, entry in layers.items()]


def _read_layer(name: str, entry: Any) -> DeclaredLayer:
    product = entry.get("decomposition", "svd") if isinstance(entry, dict) else "svd"
    if isinstance(product, str) and product not in PRODUCTS:
        raise CheckpointError(
            f"{name} is of the decomposition '{product}', which is not registered; registered are "
            f"{', '.join(PRODUCTS)}. Import the package that adds it before loading the checkpoint, or upgrade hf_drt."
        )
    if (layer := _declared_layer(name, entry)) is None:
        raise CheckpointError(
            f"quantization_config describes {name} as {entry!r}; allowed are a shape [out, in], and a form 'factored' "
            "or 'adapter' of a rank in 1..min(out, in), of a convolution up to what its decomposition allows. "
            f"config.json is damaged. {AGAIN}"
        )
    return layer


def _declared_layer(name: str, entry: Any) -> DeclaredLayer | None:
    try:
        fields = dict(entry)
        d_out, d_in = fields.pop("shape")
        form = form_from_dict(fields)
    except (TypeError, ValueError, KeyError):
        return None
    if not (_is_whole(d_out) and _is_whole(d_in) and isinstance(form, (Factored, Adapter))):
        return None
    # The kernel of a convolution is not told: by it the model's own layer is compared (hf_drt.export).
    return DeclaredLayer(name, LayerShape(d_out, d_in), form) if form.product.may_be(form, d_out, d_in) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
