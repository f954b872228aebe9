"""A run of a trial: an optimizer's twin over a few small parameters, whose values, gradients and random numbers go by
names and numbers of steps, so that two runs differ in nothing but what is done to them."""

import contextlib
import random
import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hf_drt.optim.twin import twin

RATE = 0.01
"""Least learning rate, since a scheduler's may be 0 at the start, and so large that 16-bit parameters show it."""

Layout = list[dict[str, Tensor]]  # of each group, the parameters' values by name


class Run:
    """A twin that trains parameters by their names.

    Gradients go by a parameter's name and the number of its steps, so that they are the same in every run.

    Args:
        like: Run whose numbers of steps are gone on with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layout: Layout, like: "Run | None" = None):
        self.params = {key: nn.Parameter(value.clone()) for group in layout for key, value in group.items()}
        places = [[self.params[key] for key in group] for group in layout]
        self.optimizer = twin(optimizer, places, self._stand_ins(optimizer))
        self.ages = dict.fromkeys(self.params, 0) if like is None else dict(like.ages)
        self.steps = 0 if like is None else like.steps
        for group, own in zip(self.optimizer.param_groups, layout, strict=True):
            if "param_names" in group:
                group["param_names"] = list(own)
            if isinstance(rate := group.get("lr"), (int, float, Tensor)):
                group["lr"] = rate.clamp(min=RATE) if isinstance(rate, Tensor) else max(float(rate), RATE)

    def _stand_ins(self, optimizer: torch.optim.Optimizer) -> dict[int, nn.Parameter]:
        """One of the run's parameters for every one of the optimizer's: of the same kind, where there still is one."""
        anyone = next(iter(self.params.values()))
        kinds = {key.rpartition(" ")[0]: p for key, p in reversed(self.params.items())}
        groups = enumerate(optimizer.param_groups)
        return {id(p): kinds.get(_kind(index, p), anyone) for index, group in groups for p in group["params"]}

    def step(self, without: Iterable[str] = ()) -> None:
        """One update; numbers drawn at random in it go by the number of steps alone.

        Args:
            without: Names of parameters that get no gradient.
        """
        _seed(self.steps, {p.device for p in self.params.values()})
        for key, p in self.params.items():
            if key in without:
                continue
            p.grad = _random(f"{key} {self.ages[key]}", p.shape).to(p)
            self.ages[key] += 1
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def train(self, steps: int) -> None:
        """Several updates."""
        for _ in range(steps):
            self.step()

    def counts(self) -> dict[tuple[int, str], float]:
        """The numbers in its groups."""
        groups = enumerate(self.optimizer.param_groups)
        return {(i, key): v for i, group in groups for key, v in group.items() if isinstance(v, (int, float))}

    def begin_anew(self, counts: Iterable[tuple[int, str]]) -> None:
        """Put back what counts in the groups, as far as the optimizer's defaults say to what."""
        for index, key in counts:
            if key in self.optimizer.defaults:
                self.optimizer.param_groups[index][key] = self.optimizer.defaults[key]

    def exchange(self, apart: bool = False) -> tuple[list[nn.Parameter], list[str]]:
        """In every group the first matrix, in one without any the first parameter, gives its place to others.

        Args:
            apart: The others come to the last groups, of which there is one for each, in place of the same.

        Returns:
            Those that have gone, with a gradient that an optimizer must not apply any more, and the names of the new.
        """
        names = {id(p): key for key, p in self.params.items()}
        gone, arrived = [], []
        groups = self.optimizer.param_groups
        for number in range(len(groups) // (2 if apart else 1)):
            group, goal = groups[number], groups[number + (len(groups) // 2 if apart else 0)]
            index = next((i for i, p in enumerate(group["params"]) if p.ndim > 1), 0)
            for old in group["params"][index : index + 1]:
                new = dict(_successors(names[id(old)], old))
                group["params"] = [*group["params"][:index], *group["params"][index + 1 :]]
                index = 0 if apart else index
                goal["params"] = [*goal["params"][:index], *new.values(), *goal["params"][index:]]
                self._take_in(names[id(old)], old, new)
                gone.append(old)
                arrived += new
        return gone, arrived

    def _take_in(self, key: str, old: nn.Parameter, new: dict[str, nn.Parameter]) -> None:
        self.optimizer.state.pop(old, None)
        old.grad = torch.ones_like(old)
        del self.params[key]
        self.params |= new
        self.ages |= dict.fromkeys(new, 0)

    def layout(self) -> Layout:
        """The parameters of its groups as they are now."""
        names = {id(p): key for key, p in self.params.items()}
        return [{names[id(p)]: p.detach().clone() for p in g["params"]} for g in self.optimizer.param_groups]

    def values(self) -> dict[str, Tensor]:
        """The parameters' values as they are now."""
        return {key: p.detach().clone() for key, p in self.params.items()}

    def state_names(self) -> tuple[tuple[str, ...], frozenset[str]]:
        """Names of the state per parameter, and those whose tensors have the parameter's shape."""
        pairs = [(p, key, value) for p, state in self.optimizer.state.items() for key, value in state.items()]
        other = {key for p, key, value in pairs if not isinstance(value, Tensor) or value.shape != p.shape}
        kept = dict.fromkeys(key for _, key, _ in pairs)
        return tuple(kept), frozenset(kept) - other


def small_layout(optimizer: torch.optim.Optimizer) -> Layout:
    """Up to two small parameters for every kind that a group holds, so that one stays where the other is replaced."""
    layout: Layout = []
    for index, group in enumerate(optimizer.param_groups):
        own: dict[str, Tensor] = {}
        for p in group["params"]:
            keys = (f"{_kind(index, p)} {place}" for place in range(2))
            if (key := next((key for key in keys if key not in own), None)) is not None:
                largest = max(p.shape, default=0)
                own[key] = _value(key, tuple(min(n, 6 if n == largest else 4) for n in p.shape), p)
        layout.append(own)
    return layout


def _kind(index: int, p: Tensor) -> str:
    return f"{index} {p.ndim} {p.dtype} {p.device}"


def _successors(key: str, old: nn.Parameter) -> Iterator[tuple[str, nn.Parameter]]:
    """A pair of factors of rank 2 for a matrix, another vector for a vector."""
    shape = tuple(old.shape)
    shapes = [(*shape[:-1], 2), (*shape[:-2], 2, shape[-1])] if len(shape) > 1 else [shape]
    for number, own in enumerate(shapes):
        name = f"{key}, new {number}"
        yield name, nn.Parameter(_value(name, own, old))


def _value(key: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """So small that a step in 16 bits is not rounded away."""
    device = "cpu" if like.is_meta else like.device
    return (RATE * _random(key, shape)).to(device, like.dtype)


def _random(key: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(key.encode()))
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)


def _seed(number: int, devices: set[torch.device]) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    for kind in {device.type for device in devices} - {"cpu"}:
        torch.get_device_module(kind).manual_seed(number)


@contextlib.contextmanager
def random_states_kept(layout: Layout) -> Iterator[None]:
    """The global random states of Python, numpy and torch are after the block what they were before."""
    kept, numpys = random.getstate(), np.random.get_state()
    devices = {value.device for group in layout for value in group.values() if value.device.type != "cpu"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in {device.type for device in devices}:
            present = torch.get_device_module(kind).current_device()
            numbers = {present, *(device.index or 0 for device in devices if device.type == kind)}
            stack.enter_context(torch.random.fork_rng(devices=numbers, device_type=kind))
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(numpys)
