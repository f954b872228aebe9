"""A short training loop through every form under an engine: what the processes of a trial run, and one alone."""

import hashlib
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.doctor.model import decoder, next_token_loss
from hf_drt.engines import Engine, engine_of
from hf_drt.forms import effective_weight, layer_of

SCHEDULE, STEPS = "factored@0 dense@2 adapter@4 factored@6", 8
SAVED = 5  # updates made when the run is saved: in a phase, with a switch to come
RANK, SIZES = 4, (64, 32, 48, 2, 2)  # of the low-rank forms; of the decoder
LEARNING_RATE, SMALL = 1e-3, 1e-4  # SMALL is Adam's epsilon: signs of tiny gradients do not matter then
ROWS, _LENGTH = 4, 12

State = dict[str, Any]


class Loop(Protocol):
    """What a trial asks of a loop, be it written by hand or a Trainer's. All of it is collective."""

    def run(self, end: int = STEPS, after: Callable[[], None] | None = None) -> list[float]:
        """Make the updates up to ``end``, from the first or the one after which the run was saved; the losses.

        Args:
            after: Called after each update.
        """
        ...

    def digest(self) -> str:
        """A fingerprint of the bits of all weights, and of moments where there is one way to read them."""
        ...

    def dense(self) -> dict[str, Tensor]:
        """W of every layer that changes form, and all other weights, whole and on the CPU."""
        ...


def batch(step: int) -> Tensor:
    """Token ids of all processes, ``(rows, length)``."""
    return torch.randint(0, SIZES[0], (ROWS, _LENGTH), generator=torch.Generator().manual_seed(step))


class TrialLoop:
    """A small model, its controller and its optimizer, on this process's share of the batches.

    Args:
        engine: That trains it.
        device: Of this process.
        rank, world: This process, and how many there are.
        folder: Where each process saves what it holds (:meth:`saved`) after so many updates.
        resumes: Whether to go on from there.
    """

    def __init__(
        self,
        engine: type[Engine],
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        folder: Path | None = None,
        resumes: bool = False,
    ):
        self.device, self.rank, self.world = device, rank, world
        self.file = None if folder is None else folder / f"saved-{rank}.pt"
        state: State | None = torch.load(self.file, weights_only=True) if resumes and self.file is not None else None
        self.made = 0 if state is None else SAVED
        # A model that goes on has other weights of its own, which would be seen if they were not replaced.
        self.model: nn.Module = decoder(*SIZES, seed=0 if state is None else 1).to(device)
        self.drt = DynamicRank(self.model, DRTConfig(schedule=SCHEDULE, rank=RANK), STEPS)
        if state is None:
            self.drt.apply(0)
        else:
            self.drt.load_state_dict(state["drt"])
            self._load_weights(state["weights"])
        self.wrapped = engine.begun(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, eps=SMALL, weight_decay=0.0)
        if state is not None:
            self._load_moments(state["moments"])

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name])

    def _load_moments(self, moments: dict[str, State]) -> None:
        engine = engine_of(self.model)
        for name, parameter in self.model.named_parameters():
            for key, value in moments[name].items():
                whole = value if value.ndim == 0 else value.to(self.device)
                self.optimizer.state[parameter][key] = engine.like(whole, parameter)

    def run(self, end: int = STEPS, after: Callable[[], None] | None = None) -> list[float]:
        """Make the updates up to ``end``; the losses of this process's rows."""
        losses = []
        for step in range(self.made, end):
            losses.append(self.step(step))
            if step + 1 == SAVED and self.file is not None:
                torch.save(self.saved(), self.file)
            if after is not None:
                after()
        return losses

    def step(self, step: int) -> float:
        """One update step."""
        if self.drt.match(step):
            with engine_of(self.wrapped).around_switch({}):
                self.drt.begin_step(step, self.optimizer)
        else:
            self.drt.begin_step(step, self.optimizer)
        ids = self._rows(step)
        loss = next_token_loss(self.wrapped(ids), ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _rows(self, step: int) -> Tensor:
        """This process's share of the batch of all."""
        return batch(step)[self.rank * ROWS // self.world : (self.rank + 1) * ROWS // self.world].to(self.device)

    # ---- what it holds; all of it is collective

    def saved(self) -> State:
        """All that another process needs to go on, with whole tensors on the CPU."""
        engine = engine_of(self.model)
        moments = {
            name: {key: _whole(engine, value) for key, value in self.optimizer.state.get(p, {}).items()}
            for name, p in self.model.named_parameters()
        }
        return {"drt": self.drt.state_dict(), "weights": whole_weights(self.model), "moments": moments}

    def digest(self) -> str:
        """A fingerprint of the bits of all weights and moments."""
        state = self.saved()
        return digest_of((name, W, *state["moments"][name].values()) for name, W in state["weights"].items())

    def dense(self) -> dict[str, Tensor]:
        """W of every layer that changes form, and all other weights, whole and on the CPU."""
        return dense_weights(self.model, self.drt)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """All parameters by name, whole and on the CPU. Collective."""
    engine = engine_of(model)
    return {name: _whole(engine, p) for name, p in model.named_parameters()}


def dense_weights(model: nn.Module, drt: DynamicRank) -> dict[str, Tensor]:
    """W of every layer that changes form, and all other parameters, whole and on the CPU. Collective."""
    engine = engine_of(model)
    layers = {name: effective_weight(engine.whole(layer_of(model, name))).detach().cpu() for name in drt.targets}
    rest = {name: W for name, W in whole_weights(model).items() if name.rpartition(".")[0] not in drt.targets}
    return layers | rest


def digest_of(named: Iterable[tuple[Any, ...]]) -> str:
    """A fingerprint of the bits of tensors, each group of them behind its name."""
    digest = hashlib.sha256()
    for name, *tensors in named:
        digest.update(name.encode())
        for tensor in tensors:
            file = io.BytesIO()
            torch.save(tensor.contiguous().clone(), file)
            digest.update(file.getvalue())
    return digest.hexdigest()


def _whole(engine: Engine, value: Any) -> Tensor:
    return torch.as_tensor(engine.full(value)).detach().cpu()
