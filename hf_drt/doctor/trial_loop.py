"""A short training loop through every form under an engine: what the processes of a trial run, and one alone."""

import hashlib
import io
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.doctor.model import decoder, next_token_loss
from hf_drt.engines import Engine, engine_of
from hf_drt.forms import effective_weight, layer_of

SCHEDULE, STEPS = "factored@0 dense@2 adapter@4 factored@6", 8
SAVED = 5  # updates made when the run is saved: in a phase, with a switch to come
_SIZES = (64, 32, 48, 2, 2)
_ROWS, _LENGTH = 4, 12

State = dict[str, Any]


class TrialLoop:
    """A small model, its controller and its optimizer, on this process's share of the batches.

    Args:
        engine: That trains it.
        device: Of this process.
        rank, world: This process, and how many there are.
        state: From :meth:`saved`, to go on from.
    """

    def __init__(
        self, engine: type[Engine], device: torch.device, rank: int = 0, world: int = 1, state: State | None = None
    ):
        self.device, self.rank, self.world = device, rank, world
        # A model that goes on has other weights of its own, which would be seen if they were not replaced.
        self.model: nn.Module = decoder(*_SIZES, seed=0 if state is None else 1).to(device)
        self.drt = DynamicRank(self.model, DRTConfig(schedule=SCHEDULE, rank=4), STEPS)
        if state is None:
            self.drt.apply(0)
        else:
            self.drt.load_state_dict(state["drt"])
            self._load_weights(state["weights"])
        self.wrapped = engine.begun(self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3, eps=1e-4)
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

    def run(self, first: int = 0, end: int = STEPS) -> list[float]:
        """Update steps ``first`` to ``end``; the losses of this process's rows."""
        return [self.step(step) for step in range(first, end)]

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
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, _SIZES[0], (_ROWS, _LENGTH), generator=generator)
        return ids[self.rank * _ROWS // self.world : (self.rank + 1) * _ROWS // self.world].to(self.device)

    # ---- what it holds; all of it is collective

    def saved(self) -> State:
        """All that another process needs to go on, with whole tensors on the CPU."""
        engine = engine_of(self.model)
        weights = {name: _whole(engine, p) for name, p in self.model.named_parameters()}
        moments = {
            name: {key: _whole(engine, value) for key, value in self.optimizer.state.get(p, {}).items()}
            for name, p in self.model.named_parameters()
        }
        return {"drt": self.drt.state_dict(), "weights": weights, "moments": moments}

    def digest(self) -> str:
        """A fingerprint of the bits of all weights and moments."""
        state, digest = self.saved(), hashlib.sha256()
        for name, weight in state["weights"].items():
            digest.update(name.encode())
            for tensor in (weight, *state["moments"][name].values()):
                file = io.BytesIO()
                torch.save(tensor.contiguous().clone(), file)
                digest.update(file.getvalue())
        return digest.hexdigest()

    def dense(self) -> dict[str, Tensor]:
        """W of every layer that changes form, and all other weights, whole and on the CPU."""
        engine = engine_of(self.model)
        layers = {
            name: effective_weight(engine.whole(layer_of(self.model, name))).detach().cpu() for name in self.drt.targets
        }
        rest = {
            name: _whole(engine, p)
            for name, p in self.model.named_parameters()
            if name.rpartition(".")[0] not in self.drt.targets
        }
        return layers | rest


def _whole(engine: Engine, value: Any) -> Tensor:
    return torch.as_tensor(engine.full(value)).detach().cpu()
