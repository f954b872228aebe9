"""How long a multiply-add takes, by form and dtype, as measured on this machine: what a budget counts that decides a
dtype.

Layers of random numbers stand for the target layers, one of each shape; model and generators are left alone. Steps are
theirs alone, as FLOPs of a budget are: attention, normalisation and the optimizer are not in it.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hf_drt.config import DRTConfig
from hf_drt.forms import Adapter, Dense, Factored, Form, LayerShape, empty_like, flops_of
from hf_drt.planning.layers import FrozenDict, TargetLayers
from hf_drt.precision import autocast, slow_dtype
from hf_drt.schedule import DTYPES

ROWS = 512  # vectors that a layer multiplies
REPEATS = 3  # the fastest counts
RANK = 1 / 8  # share of min(out, in)


@dataclass(frozen=True)
class Paces:
    """Seconds of a multiply-add in the forward and backward pass, over those of dense layers in fp32.

    Attributes:
        table: By form and dtype, as ``factored/bf16``; what is not in it takes for ever.
    """

    table: FrozenDict[str, float]

    def seconds(
        self, forms: Sequence[Form], shapes: Sequence[LayerShape], copies: Sequence[tuple[int, int]], dtype: str
    ) -> float:
        """Seconds of a step of some layers in some forms, over those of the same layers dense and in fp32:
        ``sum_i k_i f_i p_i / sum_i k_i f_i(dense)`` with f_i multiply-adds, p_i the pace of the layer's form, and k_i
        of the matrices that it has in use for a token."""
        counts = [active for _, active in copies]
        dense = sum(k * flops_of(Dense(), shape) for k, shape in zip(counts, shapes, strict=True))
        paced = sum(
            k * flops_of(form, shape) * self.table.get(f"{_kind(form)}/{dtype}", float("inf"))
            for k, form, shape in zip(counts, forms, shapes, strict=True)
        )
        return paced / dense

    def __str__(self) -> str:
        return ", ".join(f"{name} {pace:.2f}" for name, pace in self.table.items())


def _kind(form: Form) -> str:
    return {Dense: "dense", Factored: "factored", Adapter: "adapter"}[type(form)]


def measured_paces(targets: TargetLayers, config: DRTConfig, kinds: Iterable[str], device: str) -> Paces:
    """Those of dense layers and of layers in the low-rank forms of a schedule, of rank :data:`RANK`. What is known to
    be slow (:func:`hf_drt.precision.slow_dtype`) is not measured, and never chosen. On several processes those of the
    first.

    Args:
        kinds: Of the schedule's phases.

    Raises:
        ValueError: No target layer is linear: others may be quick at what linear layers are slow at.
    """
    shapes = Counter(
        (shape.d_out, shape.d_in) for shape in targets.shapes.values() if not shape.kernel and not shape.experts
    )
    if not shapes:
        raise ValueError(
            f"a dtype 'auto' is chosen by the seconds of linear layers, and none of the {len(targets.shapes)} target "
            "layers is one. Write fp32 or bf16."
        )
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    table = _table(shapes, config, kinds, device) if not several or dist.get_rank() == 0 else {}
    if several:
        shared = [table]
        dist.broadcast_object_list(shared, src=0)
        (table,) = shared
    return Paces(FrozenDict(table))


def _table(shapes: Counter[tuple[int, int]], config: DRTConfig, kinds: Iterable[str], device: str) -> dict[str, float]:
    dtypes = [dtype for dtype in DTYPES if slow_dtype([dtype], device) is None]
    seconds: defaultdict[str, float] = defaultdict(float)
    work: defaultdict[str, float] = defaultdict(float)
    low_rank = sorted({"factored", "adapter"} & set(kinds))
    for (d_out, d_in), count in shapes.items():
        for form in (Dense(), *(_low_rank(kind, min(d_out, d_in), config) for kind in low_rank)):
            layer = _layer(form, d_out, d_in, device)
            for dtype in dtypes:
                name = f"{_kind(form)}/{dtype}"
                seconds[name] += count * layer_seconds(layer, d_in, dtype, device)
                work[name] += count * flops_of(form, (d_out, d_in))
    pace = {name: seconds[name] / work[name] for name in seconds}
    return {name: value / pace["dense/fp32"] for name, value in sorted(pace.items())}


def _low_rank(kind: str, width: int, config: DRTConfig) -> Form:
    rank = max(1, round(RANK * width))
    return Factored(rank) if kind == "factored" else Adapter(rank, config.alpha_of(rank), "zero")


def _layer(form: Form, d_out: int, d_in: int, device: str) -> nn.Module:
    linear = nn.Linear(d_in, d_out, bias=False, device="meta")
    linear.weight = nn.Parameter(torch.empty(d_out, d_in, device=device))
    layer = linear if isinstance(form, Dense) else empty_like(linear, form)
    generator = torch.Generator(device).manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(std=d_in**-0.5, generator=generator)
    return layer


def layer_seconds(layer: nn.Module, d_in: int, dtype: str, device: str, rows: int = ROWS) -> float:
    """Of a forward and backward pass, the fastest of :data:`REPEATS` after one that is not counted."""
    x = torch.randn(rows, d_in, generator=torch.Generator(device).manual_seed(1), device=device, requires_grad=True)
    return min(list(_timed(lambda: _passes(layer, x, dtype, device), device))[1:])


def _passes(layer: nn.Module, x: Tensor, dtype: str, device: str) -> None:
    with autocast(dtype, device):
        y = layer(x)
    y.backward(torch.ones_like(y))


def _timed(work: Callable[[], None], device: str) -> Iterator[float]:
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - started
