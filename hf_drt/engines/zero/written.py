"""What a checkpoint of DeepSpeed has of every parameter, whatever number of processes wrote it.

Each process has written its part of the float32 weights and of the optimizer's state, as flat tensors that are laid out
as :mod:`hf_drt.engines.zero.layout` says. DeepSpeed's own conversion ("universal checkpoints") knows the state of Adam
alone, and writes every parameter into files of its own.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

_STAGE_3, _FROZEN = "fp32_flat_groups", "frozen_param_fragments"
COUNTS = ("global_steps", "global_samples", "skipped_steps")  # of the engine, in the model's file


class Slice(NamedTuple):
    """Where one process's part of a parameter lies: elements ``offset`` to ``offset + count`` of its flat tensors.

    Attributes:
        master: The flat tensor of float32 weights.
        state: Of the optimizer, of that flat tensor.
    """

    master: Tensor
    state: dict[str, Any]
    offset: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.offset, self.count)


class Written:
    """A checkpoint's folder, opened: files are mapped into memory, and read where they are asked for.

    Args:
        folder: Of the Trainer's checkpoint.

    Attributes:
        partitioned: Whether it is of ZeRO-3.
        loss_scaler: DeepSpeed's, with its present scale.
        counts: Of the engine, by the names in :data:`COUNTS`.

    Raises:
        ValueError: A process's part is missing.
    """

    def __init__(self, folder: Path):
        inside, ranks = inside_of(folder), _optimizer_files(folder)
        self._models = [_opened(path) for path in sorted(inside.glob("*model_states.pt"), key=_first_number)]
        model, parts = self._models[0], [_opened(path)["optimizer_state_dict"] for path in ranks]
        if len(ranks) != model["dp_world_size"]:
            raise ValueError(
                f"{inside} was written by {model['dp_world_size']} processes, and holds the optimizer's state of "
                f"{len(ranks)}. Resume from another checkpoint."
            )
        self.partitioned = _STAGE_3 in parts[0]
        self.loss_scaler = parts[0].get("loss_scaler")
        self.counts = {name: model[name] for name in COUNTS if name in model}
        self._slices: dict[str, list[Slice]] = defaultdict(list)
        for part in parts:
            for name, held in _in_parts(part, model, len(parts)) if self.partitioned else _in_one(part):
                self._slices[name].append(held)

    def master(self, name: str) -> Tensor:
        """The float32 values of a trained parameter, ``(elements,)``."""
        return torch.cat([held.of(held.master) for held in self._slices[name]])

    def state(self, name: str) -> dict[str, Any]:
        """The optimizer's state of a trained parameter: tensors ``(elements,)``, and what is one number, as a count."""
        first, *_ = slices = self._slices[name]
        return {
            key: torch.cat([held.of(held.state[key]) for held in slices]) if _is_flat(value, first.master) else value
            for key, value in first.state.items()
        }

    def value(self, name: str) -> Tensor:
        """What the model computed with: of a parameter or a buffer; its elements in order, with padding behind them."""
        first, *others = self._models
        if self.partitioned and name in self._slices:
            return self.master(name)
        if self.partitioned and name in (first.get(_FROZEN) or {}):
            return torch.cat([model[_FROZEN][name].flatten() for model in (first, *others)])
        try:
            return first["module"][name]
        except KeyError:
            raise ValueError(f"the checkpoint has no {name}. Resume from another checkpoint.") from None


def has_layout(folder: Path, processes: int, stage: int) -> bool:
    """Whether DeepSpeed itself reads a checkpoint in so many processes, under this stage of ZeRO."""
    paths = _optimizer_files(folder)
    return len(paths) == processes and (_STAGE_3 in _opened(paths[0])["optimizer_state_dict"]) == (stage == 3)


def inside_of(folder: Path) -> Path:
    """Where in a Trainer's checkpoint DeepSpeed has its files."""
    return folder / (folder / "latest").read_text().strip()


def _optimizer_files(folder: Path) -> list[Path]:
    """By rank."""
    return sorted(inside_of(folder).glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=_first_number)


def _opened(path: Path) -> dict[str, Any]:
    """DeepSpeed's files hold objects of its classes, which it loads in the same way."""
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)


def _first_number(path: Path) -> int:
    """The rank of ``zero_pp_rank_3_mp_rank_00_optim_states.pt``; bf16 weights put another word before it."""
    return int(re.findall(r"_rank_(\d+)", path.name)[0])


def _is_flat(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


def _in_one(part: dict[str, Any]) -> Iterator[tuple[str, Slice]]:
    """ZeRO-1 and 2."""
    states = part["base_optimizer_state"]["state"]
    for index, master in enumerate(part["single_partition_of_fp32_groups"]):
        for name, held in part["param_slice_mappings"][index].items():
            yield name, Slice(master, states.get(index, {}), held.start, held.numel)


def _in_parts(part: dict[str, Any], model: dict[str, Any], processes: int) -> Iterator[tuple[str, Slice]]:
    """ZeRO-3: every parameter in as many equal parts as there were processes, the last one with padding, which is
    left on: :meth:`Written.master` ends with it."""
    states = part["optimizer_state_dict"]["state"]
    for index, (master, shapes) in enumerate(zip(part["fp32_flat_groups"], model["param_shapes"], strict=True)):
        offset = 0
        for name, shape in shapes.items():
            count = -(-math.prod(shape) // processes)
            yield name, Slice(master, states.get(index, {}), offset, count)
            offset += count
