"""What is tried of each engine: a loop written by hand, or a Trainer's where its own library begins it."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from hf_drt.doctor.check import told
from hf_drt.doctor.extensions import left_lock
from hf_drt.doctor.model import decoder
from hf_drt.doctor.trial_loop import Loop, TrialLoop
from hf_drt.engines import ENGINES, Engine, engine_of, import_engines


@dataclass(frozen=True)
class Place:
    """Where a loop runs.

    Attributes:
        device: Of this process.
        rank, world: This process, and how many there are.
        folder: Where the run is saved.
        resumes: Whether it goes on from there.
    """

    device: torch.device
    rank: int
    world: int
    folder: Path
    resumes: bool = False


class Trial(Protocol):
    """One way to train with an engine."""

    def left_out(self, device: torch.device, quick: bool) -> str | None:
        """Why it is not tried, or None."""
        ...

    def loop(self, place: Place) -> Loop:
        """The loop, before its first update."""
        ...


@dataclass(frozen=True)
class Missing:
    """An engine whose library cannot be imported.

    Attributes:
        error: What the import raised.
    """

    error: ImportError

    def left_out(self, device: torch.device, quick: bool) -> str | None:
        return f"not installed ({told(self.error)})"

    def loop(self, place: Place) -> Loop:
        raise self.error


@dataclass(frozen=True)
class ByHand:
    """An engine that a hand-written loop begins.

    Attributes:
        engine: It.
    """

    engine: type[Engine]

    def left_out(self, device: torch.device, quick: bool) -> str | None:
        try:
            wrapped = self.engine.begun(decoder(8, 8, 8, 1, 1).to(device))
        except NotImplementedError as error:
            return str(error)
        if type(engine_of(wrapped)) is not self.engine:
            name = self.engine.__name__
            return f"{name} is not begun by what it inherits, and says nothing of its own (Engine.begun)"
        return None

    def loop(self, place: Place) -> Loop:
        return TrialLoop(self.engine, place.device, place.rank, place.world, place.folder, place.resumes)


@dataclass(frozen=True)
class ByTrainer:
    """An engine that its library begins, in a Trainer.

    Attributes:
        settings: Of ``TrainingArguments``.
    """

    settings: dict[str, Any]

    def left_out(self, device: torch.device, quick: bool) -> str | None:
        if quick:
            return "its library may compile at its first use, which takes minutes: leave --quick out"
        return left_lock()

    def loop(self, place: Place) -> Loop:
        by_trainer = importlib.import_module("hf_drt.doctor.trainer_loop")  # with transformers, only where it is needed
        return by_trainer.TrainerLoop(self.settings, place.device, place.world, place.folder, place.resumes)


def trials() -> Iterator[tuple[str, Trial]]:
    """All of them by name: one for an engine, or for each of the ways in which a Trainer begins it."""
    for library, error in import_engines().items():
        yield library, Missing(error)
    for name, engine in ENGINES.items():
        if settings := engine.trainer_settings():
            yield from ((way, ByTrainer(given)) for way, given in settings.items())
        else:
            yield name, ByHand(engine)
