"""The linear layers of a checkpoint folder, read one at a time: forms, spectra, and what a truncation would cost.

Any safetensors checkpoint will do, in one file or in shards: a training checkpoint, a native or a dense model. No model
is built and no more than one layer is in memory.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from hf_drt.checkpoint import METHOD, STATE_NAME, CheckpointError, read_block, read_state, shapes_by_file, weight_files
from hf_drt.forms import (
    Adapter,
    Dense,
    Factored,
    Form,
    LayerShape,
    Layout,
    factors,
    form_from_dict,
    frozen_names,
    in_one_dtype,
    merged,
    tensor_names,
)
from hf_drt.linalg import (
    effective_rank,
    factored_singular_values,
    retained_energy,
    singular_values,
    stable_rank,
    truncation_error,
    working_dtype,
)
from hf_drt.planning import break_even_rank
from hf_drt.schedule import Schedule

_AGAIN = "Save or download the checkpoint again."
_IN_A_BLOCK = re.compile(r"\.\d+\.")
_NO_LINEAR = re.compile(r"embed|relative_attention_bias|(^|\.)w[tp]e\.", re.IGNORECASE)
_OTHER_FILES = {
    "adapter_config.json": "a PEFT adapter, which holds no weights of its own: merge it into its base, and give that",
    "pytorch_model_fsdp_0": "weights in FSDP's shards: save the whole model with trainer.save_model(), and give that",
    "pytorch_model.bin": "weights as pytorch_model.bin: load them and save them again with save_pretrained",
    "pytorch_model.bin.index.json": "weights as pytorch_model.bin: load them and save them again with save_pretrained",
}


@dataclass(frozen=True)
class StoredLayer:
    """A linear layer in a checkpoint's files.

    Attributes:
        name: In the files.
        shape: ``(out, in)``; of a dense layer as stored, which is ``(in, out)`` in GPT-2's ``Conv1D``.
        form: That it is in.
        files: Where each of its tensors lies.
        transposed: Whether a full-size tensor is stored as ``(in, out)``; None where the files do not tell.
    """

    name: str
    shape: LayerShape
    form: Form
    files: dict[str, Path]
    transposed: bool | None = None

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, in float32 or better.

        Raises:
            CheckpointError: It is quantized.
        """
        tensor = self._stored(name)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise CheckpointError(f"{self.name}.{name} is quantized ({tensor.dtype}). Inspect the model before that.")
        return tensor.to(working_dtype(tensor.dtype))

    @property
    def _codes(self) -> tuple[str, ...]:
        """The tensors of a base that is kept in int8."""
        return tuple(frozen_names(self.form)) if isinstance(self.form, Adapter) and self.form.dtype == "int8" else ()

    def _stored(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as weights:
            return weights.get_tensor(f"{self.name}.{name}")

    def matrix(self) -> Tensor:
        """The effective W, ``(out, in)`` but for a dense layer, which is as stored."""
        if isinstance(self.form, Dense):
            weight = self.tensor("weight")
            return weight.flatten(1) if weight.ndim > 2 else weight
        tensors = {name: self.tensor(name) for name in tensor_names() if name in self.files and name not in self._codes}
        if self._codes:
            tensors |= in_one_dtype({name: self._stored(name) for name in self._codes}, torch.float32)
        kernel = tuple(tensors["base"].shape[2:]) if "base" in tensors else ()
        return merged(self.form, tensors, Layout(bool(self.transposed), kernel))

    def spectrum(self) -> "Spectrum":
        """Its singular values; of a factored layer from r x r matrices.

        Raises:
            ValueError: The weights hold inf or nan.
        """
        try:
            if isinstance(self.form, Factored):
                tensors = {name: self.tensor(name) for name in tensor_names() if name in self.files}
                values = factored_singular_values(*factors(self.form, tensors))
            else:
                values = singular_values(self.matrix())
        except ValueError as error:
            raise CheckpointError(f"{self.name}: {error}") from None
        return Spectrum(self, values)


@dataclass(frozen=True)
class Spectrum:
    """A layer's singular values, descending, and what is read from them."""

    layer: StoredLayer
    values: Tensor

    @cached_property
    def effective_rank(self) -> float:
        """``exp`` of the entropy of the normalised singular values."""
        return effective_rank(self.values)

    @cached_property
    def stable_rank(self) -> float:
        """``||W||_F^2 / sigma_1^2``."""
        return stable_rank(self.values)

    def energy(self, share: float) -> float:
        """Share of ``||W||_F^2`` in the largest singular values, as many as this share of min(out, in)."""
        return retained_energy(self.values, self._rank(share))

    def error(self, share: float) -> float:
        """Relative Frobenius error of a truncation to that rank."""
        return truncation_error(self.values, self._rank(share))

    def _rank(self, share: float) -> int:
        return max(1, round(share * min(self.layer.shape)))

    def energy_rank(self, share: float) -> int:
        """The smallest rank that keeps this share of ``||W||_F^2``."""
        kept = (self.values.double() ** 2).cumsum(0)
        return min(len(kept), int((kept < share * kept[-1]).sum()) + 1)

    def truncated(self, error: float) -> Form:
        """The smallest factors with at most this relative Frobenius error; Dense where they would save nothing."""
        rank = max(1, self.energy_rank(1 - error**2))
        return Factored(rank) if rank < break_even_rank(*self.layer.shape) else Dense()


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        kind: 'training checkpoint', 'native model' or 'dense model'.
        layers: Its linear layers, in the order of their names.
        parameters: Stored numbers, of all tensors.
        plan: Of a training checkpoint: the phases, the length of the run, and the index of the phase in progress.
        fused: Forms of the fused experts among the declared layers, by name. Each is many matrices, which are not read.
    """

    kind: str
    layers: tuple[StoredLayer, ...]
    parameters: int
    plan: tuple[str, int, int] | None = None
    fused: Mapping[str, Form] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """The linear layers of a checkpoint, from its small files and the headers of its weights.

    Of a training checkpoint these are its target layers; otherwise all matrices called ``weight`` inside numbered
    blocks, embeddings aside.

    Raises:
        CheckpointError: No such path, not a checkpoint, damaged, of a newer format, or not in safetensors files.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"there is no such path: {path}. Give the folder of a checkpoint, or a safetensors file.")
    files = [path] if path.is_file() else _files(path)
    shapes = shapes_by_file(files, _AGAIN)
    places: dict[str, dict[str, Path]] = defaultdict(dict)
    sizes: dict[str, tuple[int, ...]] = {}
    for file, tensors in shapes.items():
        for key, shape in tensors.items():
            layer, _, tensor = key.rpartition(".")
            places[layer][tensor], sizes[key] = file, shape
    parameters = sum(torch.Size(shape).numel() for shape in sizes.values())
    kind, declared, plan = _declared(path)
    dense: dict[str, tuple[LayerShape, Form]] = {
        name: (_pair(sizes[f"{name}.weight"]), Dense())
        for name, tensors in places.items()
        if kind != "training checkpoint" and _is_linear(name, sizes.get(f"{name}.weight", ()))
    }
    fused = {name: form for name, (_, form) in declared.items() if _is_fused(name, sizes)}
    linear = {name: entry for name, entry in {**dense, **declared}.items() if name not in fused}
    layers = tuple(_layer(name, *entry, places, sizes) for name, entry in linear.items())
    if not layers and not fused:
        raise CheckpointError(f"{path} holds no linear layer inside a block, so there is nothing to inspect.")
    return Checkpoint(kind, tuple(sorted(layers, key=lambda layer: _natural(layer.name))), parameters, plan, fused)


def spectra(layers: Sequence[StoredLayer], tick: Callable[[], None] = lambda: None) -> Iterator[Spectrum]:
    """The spectra of layers, one after the other; ``tick`` is called after each."""
    for layer in layers:
        yield layer.spectrum()
        tick()


def _files(folder: Path) -> list[Path]:
    files = weight_files(folder, _AGAIN)
    if len(files) == 1 and not files[0].is_file():
        for name, what in _OTHER_FILES.items():
            if (folder / name).exists():
                raise CheckpointError(f"{folder} holds {what}.")
        raise CheckpointError(
            f"{folder} is not a checkpoint: it holds neither model.safetensors nor model.safetensors.index.json. Give "
            "the folder of a model or of a checkpoint-N."
        )
    return files


def _declared(path: Path) -> tuple[str, dict[str, tuple[LayerShape, Form]], tuple[str, int, int] | None]:
    """Kind, and shape and form of the layers that small files beside the weights tell of."""
    folder = path if path.is_dir() else path.parent
    if (folder / STATE_NAME).is_file():
        state = read_state(folder)
        return "training checkpoint", _state_layers(folder, state), _state_plan(folder, state)
    config = folder / "config.json"
    try:
        block = json.loads(config.read_text()).get("quantization_config") if config.is_file() else None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        raise CheckpointError(f"{config} is damaged. {_AGAIN}") from None
    if isinstance(block, dict) and block.get("quant_method") == METHOD:
        return "native model", {layer.name: (layer.shape, layer.form) for layer in read_block(block)}, None
    return "dense model", {}, None


def _pair(size: tuple[int, ...]) -> LayerShape:
    rows, columns = size
    return LayerShape(rows, columns)


def _is_fused(name: str, sizes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a declared layer is one of fused experts, in any form: a stack of matrices."""
    return any(len(sizes.get(key, ())) == 3 for key in (name, f"{name}.U", f"{name}.lora_A"))


def _state_layers(folder: Path, state: dict[str, Any]) -> dict[str, tuple[LayerShape, Form]]:
    try:
        entries = {name: dict(entry) for name, entry in state["layers"].items()}
        return {name: (LayerShape(*entry.pop("shape")), form_from_dict(entry)) for name, entry in entries.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / STATE_NAME} is damaged: its layers cannot be read ({error}). {_AGAIN}"
        ) from None


def _state_plan(folder: Path, state: dict[str, Any]) -> tuple[str, int, int]:
    plan: Any
    plan, steps, phase = (state.get(key) for key in ("plan", "max_steps", "phase"))
    try:
        entries = Schedule.parse(plan).entries
        if not (isinstance(steps, int) and isinstance(phase, int) and 0 <= phase < len(entries)):
            raise ValueError(f"phase {phase!r} of {len(entries)}, {steps!r} update steps")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / STATE_NAME} is damaged: its plan {plan!r} cannot be read ({error})."
        ) from None
    return plan, steps, phase


def _layer(
    name: str, shape: LayerShape, form: Form, places: dict[str, dict[str, Path]], sizes: dict[str, tuple[int, ...]]
) -> StoredLayer:
    needed = _needed(form)
    if missing := [tensor for tensor in needed if tensor not in places.get(name, {})]:
        raise CheckpointError(f"the weights lack {name}.{missing[0]}, which {form} needs. {_AGAIN}")
    # A low-rank layer's entry `weight`, without elements, is laid out as the dense weight would be.
    mark = sizes.get(f"{name}.weight", ())
    transposed = None if isinstance(form, Dense) or len(mark) != 2 else mark[1] == 0
    return StoredLayer(name, shape, form, places[name], transposed)


def _needed(form: Form) -> tuple[str, ...]:
    if isinstance(form, Dense):
        return ("weight",)
    return *frozen_names(form), *form.product.needed(form.adapts)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    inside = _IN_A_BLOCK.search(f".{name}.") is not None and _NO_LINEAR.search(f"{name}.") is None
    return inside and len(shape) == 2 and min(shape) > 1


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key by which layer 10 follows layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
