"""Switches of a model of 100 million parameters: how long they take, and the memory that they need at most.

The promise is that a switch needs no more than the larger of its two phases, plus one layer: weight, gradient and the
two moments of AdamW. Phases train on one short row, so that activations hide nothing. On an accelerator the allocator
tells; on a CPU the tensors that are alive are counted (:class:`hf_drt.simulate.StepCounter`).
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.doctor.check import Bench, Finding, found, not_tried
from hf_drt.doctor.devices import synchronize
from hf_drt.doctor.model import Decoder, decoder, next_token_loss
from hf_drt.simulate import StepCounter

SCHEDULE = "dense@0 factored@1 dense@2 adapter@3 dense@4"
FULL, QUICK = (16384, 768, 2048, 12, 12), (1024, 192, 512, 4, 4)
_TOKENS = 16
_KEPT = 1e-3  # largest change of a logit by a switch that keeps the function
_MIB = 2**20


@dataclass(frozen=True)
class _Measured:
    """Peak bytes and seconds of a piece of work."""

    peak: int
    seconds: float


class _Run:
    """The model, its controller and its optimizer."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device):
        self.model: Decoder = decoder(*sizes).to(device)
        self.drt = DynamicRank(self.model, DRTConfig(schedule=SCHEDULE), max_steps=len(SCHEDULE.split()))
        self.drt.apply(0)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=False)  # whose other way takes memory of its own
        self.ids = torch.arange(_TOKENS, device=device)[None]

    def train(self) -> None:
        """One update step."""
        next_token_loss(self.model(self.ids), self.ids).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Of the row that it is trained on."""
        return self.model(self.ids)

    def tensors(self) -> Iterator[Tensor]:
        """What is alive between two steps."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        return filter(torch.is_tensor, itertools.chain(self.model.parameters(), self.model.buffers(), states))


def check_switch(bench: Bench) -> Iterator[Finding]:
    """One finding for each switch."""
    sizes = QUICK if bench.quick else FULL
    run = _Run(sizes, bench.device)
    parameters = sum(p.numel() for p in run.model.parameters())
    if bench.quick:
        yield not_tried("a model of 100 million parameters", f"left out of a quick look; here are {parameters:,}")
    width, hidden = sizes[1:3]
    layer = 4 * width * hidden * 4
    last = _measured(run, run.train, bench.device)
    names = [entry.split("@")[0] for entry in SCHEDULE.split()]
    for step, (before, after) in enumerate(itertools.pairwise(names), 1):
        logits = run.logits()
        change = _measured(run, lambda step=step: run.drt.begin_step(step, run.optimizer), bench.device)
        moved = (run.logits() - logits).abs().max().item()
        training = _measured(run, run.train, bench.device)
        promised = max(last.peak, training.peak) + layer
        yield _finding(f"{before} to {after}", change, promised, moved, len(run.drt.targets), after != "factored")
        last = training


def _finding(what: str, change: _Measured, promised: int, moved: float, layers: int, keeps: bool) -> Finding:
    seen = (
        f"{change.seconds:.2f} s for {layers} layers; peak {change.peak / _MIB:,.0f} MiB, promised at most "
        f"{promised / _MIB:,.0f}"
    )
    if keeps:
        seen += f"; logits move by {moved:.0e}, and may by {_KEPT:.0e}"
    holds = change.peak <= promised and (moved <= _KEPT or not keeps)
    values = {
        "seconds": change.seconds, "layers": layers, "peak": change.peak, "promised": promised, "logits move": moved,
    }  # fmt: skip
    return found(what, holds, seen, values)


def _measured(run: _Run, work: Callable[[], object], device: torch.device) -> _Measured:
    counted = device.type != "cuda"
    counter = StepCounter()
    if counted:
        for tensor in run.tensors():
            counter.add(tensor)
    else:
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    started = time.perf_counter()
    if counted:
        with counter:
            work()
    else:
        work()
    synchronize(device)
    seconds = time.perf_counter() - started
    return _Measured(counter.peak if counted else torch.cuda.max_memory_allocated(device), seconds)
