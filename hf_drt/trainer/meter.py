"""PhaseMeter: what the phase in progress has cost so far. Kept in the checkpoint, so that a resumed phase adds up."""

import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from hf_drt.trainer.batches import samples_in, tokens_in
from hf_drt.trainer.memory import read_peak, reset_peak


@dataclass
class PhaseMeter:
    """Update steps, seconds within steps (evaluation, saving and switches excluded), samples, tokens and peak memory
    (MiB) of one phase; and ``earlier``, the seconds that the phases before it and all switches took."""

    phase: int | None = None
    steps: int = 0
    seconds: float = 0.0
    samples: int = 0
    tokens: int = 0
    peak_memory: float | None = None
    earlier: float = 0.0

    def __post_init__(self) -> None:
        self._started: float | None = None
        self._device = torch.device("cpu")

    @property
    def trained(self) -> float:
        """Seconds since the run's first step: steps and switches; evaluation and saving excluded."""
        return self.earlier + self.seconds

    def start_phase(self, phase: int, device: torch.device, switch: float = 0.0) -> None:
        """Forget the phase before, but for its seconds and those of the ``switch``. The same phase again, as after a
        resume, goes on counting."""
        if phase != self.phase:
            self.__init__(phase, earlier=self.trained + switch)
        self._device = device
        reset_peak(device)

    def start_step(self) -> None:
        """An update step begins."""
        self._started = time.perf_counter()

    def end_step(self) -> None:
        """An update step has ended."""
        if self._started is not None:
            self.seconds += time.perf_counter() - self._started
            self.steps += 1
            self._started = None

    def count(self, batches: list[Any], processes: int = 1) -> None:
        """Add the samples and tokens of the micro-batches of one update step, alike on all processes."""
        for batch in batches:
            self.samples += processes * samples_in(batch)
            self.tokens += processes * tokens_in(batch)

    def row(self) -> dict[str, float]:
        """The phase so far, as log entries."""
        self._read_peak()
        row = {"drt_phase": self.phase, "drt_phase_steps": self.steps, "drt_phase_seconds": round(self.seconds, 4)}
        if self.seconds > 0:
            for name, number in (("samples", self.samples), ("tokens", self.tokens)):
                if number:
                    row[f"drt_{name}_per_second"] = round(number / self.seconds, 3)
        if self.peak_memory is not None:
            row["drt_peak_memory_mib"] = round(self.peak_memory, 1)
        return row

    def state_dict(self) -> dict[str, Any]:
        """The counts, JSON-serialisable."""
        self._read_peak()
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from :meth:`state_dict`."""
        for f in fields(self):
            setattr(self, f.name, state.get(f.name, f.default))

    def _read_peak(self) -> None:
        if (peak := read_peak(self._device)) is not None:
            self.peak_memory = max(peak, self.peak_memory or 0.0)
