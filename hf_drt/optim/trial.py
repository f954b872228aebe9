"""Does an optimizer of which nothing is known follow a replaced parameter? Seen on twins over a few small parameters.

One twin trains, then a matrix in each of its groups gives its place to a pair of factors, as in a change of form, and
it goes on. What a change of form and a checkpoint rely on must hold, or the optimizer is refused with what was seen:

- the old parameter is left alone, and let go;
- the new ones' first update is about as large as with a fresh optimizer and the same gradients. Where all is kept per
  parameter the two are equal. Adam with betas (0.9, 0.999) whose bias correction counts the group's steps makes one
  that is 1.8 times as large after 400 steps, and 3.2 times in the end;
- all other parameters train as if nothing had been replaced, to the bit;
- a checkpoint of it, loaded into a fresh one, goes on to the same bits.

Nothing of the optimizer, its parameters and the global random states is changed. What a twin cannot show is code that
goes by sizes or names which its parameters do not have.
"""

import contextlib
import gc
import io
import random
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hf_drt.optim.twin import TwinError, twin

STEPS, AFTER = 400, 12
"""Steps before the exchange, by which bias corrections fade, and after it; what is done every 10 steps is in both."""
FACTOR = 1.5
"""Within which a first update is of like size."""
RATE = 0.01
"""Least learning rate, since a scheduler's may be 0 at the start, and so large that 16-bit parameters show it."""

Layout = list[dict[str, Tensor]]  # of each group, the parameters' values by name


class UnfitError(ValueError):
    """The trial has failed; the text says what was seen, as in "the optimizer ...: it ..."."""


@dataclass(frozen=True)
class Findings:
    """What a trial has seen of an optimizer that follows.

    Attributes:
        kept: Names of its state per parameter.
        shaped: Those of them that have the parameter's shape, whatever that is.
        reads_rate: Whether the ``lr`` of a group acts on its updates, and not on the first alone.
        apart: What stands against a parameter group that is added while it is empty; empty if nothing does.
    """

    kept: tuple[str, ...]
    shaped: frozenset[str]
    reads_rate: bool
    apart: str


_FOUND: weakref.WeakKeyDictionary[torch.optim.Optimizer, Findings] = weakref.WeakKeyDictionary()


def tried(optimizer: torch.optim.Optimizer) -> Findings:
    """What :func:`trial` finds, made at the first call for an optimizer that it succeeds with.

    Raises:
        UnfitError: As there.
    """
    if optimizer not in _FOUND:
        _FOUND[optimizer] = trial(optimizer)
    return _FOUND[optimizer]


def trial(optimizer: torch.optim.Optimizer) -> Findings:
    """Try an optimizer, in about a second.

    Raises:
        UnfitError: It cannot be tried, or does not follow; with what was seen.
    """
    layout = _layout(optimizer)
    if not any(layout):
        raise UnfitError("its groups hold no parameters.")
    with _random_states_kept(layout):
        try:
            return _trial(optimizer, layout)
        except TwinError as error:
            raise UnfitError(str(error)) from error


def _trial(optimizer: torch.optim.Optimizer, layout: Layout) -> Findings:
    run, undisturbed = _Run(optimizer, layout), _Run(optimizer, layout)
    started = run.counts()
    with _seen_as("in the steps of a parameter without state"):
        for _ in range(STEPS):
            run.step()
            undisturbed.step()
    counts = {key for key, value in run.counts().items() if value != started.get(key)}
    with _seen_as(f"once a parameter had been replaced after {STEPS} steps"):
        old, new = run.exchange()
        fresh = _Run(optimizer, run.layout())
        fresh.begin_anew(counts)
        _check_new(run, undisturbed, fresh, old, new)
        _check_others(optimizer, run, undisturbed)
        _check_let_go(run, old)
    with _seen_as("as its state was saved and loaded"):
        _check_resumes(optimizer, run)
    with _seen_as("with twice its lr"):
        reads_rate = _reads_rate(optimizer, layout)
    return Findings(*run.state_names(), reads_rate, _apart(optimizer, layout))


def _check_new(run: "_Run", undisturbed: "_Run", fresh: "_Run", old: list[nn.Parameter], new: list[str]) -> None:
    """Take the steps after the exchange."""
    before, starts = [p.detach().clone() for p in old], run.values()
    first: dict[str, tuple[float, float]] = {}
    for _ in range(AFTER):
        for each in (run, undisturbed, fresh):
            each.step()
        now, usual = run.values(), fresh.values()
        for key in new:
            if not torch.equal(usual[key], starts[key]):
                first.setdefault(key, (_distance(now[key], starts[key]), _distance(usual[key], starts[key])))
    if not all(map(torch.equal, old, before)):
        raise UnfitError("it goes on training a parameter that has been replaced in its group.")
    _check_first(first, new)


def _check_first(first: Mapping[str, tuple[float, float]], new: list[str]) -> None:
    if set(new) - first.keys() or any(size == 0 for size, _ in first.values()):
        raise UnfitError(f"a parameter that had taken another's place in its group did not move in {AFTER} steps.")
    for size, usual in first.values():
        if not 1 / FACTOR <= size / usual <= FACTOR:
            raise UnfitError(
                f"a new parameter's first update after {STEPS} steps was {size / usual:.2g} times that of a fresh "
                f"optimizer with the same gradient (allowed are {1 / FACTOR:.2g} to {FACTOR:g}): it begins with what "
                "was counted for others."
            )


def _check_others(optimizer: torch.optim.Optimizer, run: "_Run", undisturbed: "_Run") -> None:
    now, usual = run.values(), undisturbed.values()
    stayed = now.keys() & usual.keys()
    if (share := _difference({key: now[key] for key in stayed}, usual)) and not _draws(optimizer, run.layout()):
        raise UnfitError(
            f"parameters that stayed trained otherwise than without the exchange, by up to {share:.1g} of their size."
        )


def _draws(optimizer: torch.optim.Optimizer, layout: Layout) -> bool:
    """Whether its steps draw random numbers, as for stochastic rounding: an exchange moves on what others get then."""
    one, other = _Run(optimizer, layout), _Run(optimizer, layout)
    other.steps = STEPS
    for each in (one, other):
        each.train(AFTER)
    return _difference(one.values(), other.values()) > 0


def _check_let_go(run: "_Run", old: list[nn.Parameter]) -> None:
    references = [weakref.ref(p) for p in old]
    old.clear()
    if any(reference() is not None for reference in references):
        gc.collect()
    if any(reference() is not None for reference in references):
        raise UnfitError(f"it keeps a replaced parameter alive, {AFTER} steps after its group and its state let it go.")


def _check_resumes(optimizer: torch.optim.Optimizer, run: "_Run") -> None:
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(file):
        raise UnfitError(
            f"its state_dict holds {', '.join(foreign)}, which torch.load(weights_only=True) refuses, as a resume does."
        )
    file.seek(0)
    other = _Run(optimizer, run.layout(), run)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for each in (run, other):
        each.train(AFTER)
    if share := _difference(run.values(), other.values()):
        raise UnfitError(
            f"a fresh one that loaded its state_dict went on otherwise than itself, by up to {share:.1g} of a "
            "parameter's size: some of its state is kept outside its state_dict."
        )


def _reads_rate(optimizer: torch.optim.Optimizer, layout: Layout) -> bool:
    one, other = _Run(optimizer, layout), _Run(optimizer, layout)
    for each in (one, other):
        each.train(AFTER)
    for group in other.optimizer.param_groups:
        if group.get("lr") is None:
            return False
        group["lr"] = group["lr"] * 2
    for each in (one, other):
        each.train(AFTER)
    return _difference(one.values(), other.values()) > 0


def _apart(optimizer: torch.optim.Optimizer, layout: Layout) -> str:
    """What it does where the new parameters come to a group that was added while it was empty."""
    run = _Run(optimizer, layout)
    try:
        with _seen_as("as a group was added"):
            for group in list(run.optimizer.param_groups):
                group.pop("param_names", None)  # as a group with names takes none beside it without
                options = {key: value for key, value in group.items() if key != "params"}
                run.optimizer.add_param_group(options | {"params": []})
            run.train(AFTER)
            _, new = run.exchange(apart=True)
            starts = run.values()
            run.train(AFTER)
    except UnfitError as error:
        return str(error)
    still = [key for key in new if torch.equal(run.values()[key], starts[key])]
    return "it did not train parameters that came to such a group." if still else ""


class _Run:
    """A twin that trains parameters by their names.

    Gradients go by a parameter's name and the number of its steps, so that they are the same in every run.

    Args:
        like: Run whose numbers of steps are gone on with.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layout: Layout, like: "_Run | None" = None):
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

    def step(self) -> None:
        """One update; numbers drawn at random in it go by the number of steps alone."""
        _seed(self.steps, {p.device for p in self.params.values()})
        for key, p in self.params.items():
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


def _layout(optimizer: torch.optim.Optimizer) -> Layout:
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


def _difference(now: Mapping[str, Tensor], usual: Mapping[str, Tensor]) -> float:
    """Largest difference of parameters, as a share of their size; 0 where all bits are equal."""
    changed = (key for key in now if not torch.equal(now[key], usual[key]))
    return max((_distance(now[key], usual[key]) / max(_distance(usual[key], 0), 1e-30) for key in changed), default=0)


def _distance(a: Tensor, b: Tensor | float) -> float:
    return float((a.double() - b).norm())


def _seed(number: int, devices: set[torch.device]) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)
    for kind in {device.type for device in devices} - {"cpu"}:
        torch.get_device_module(kind).manual_seed(number)


@contextlib.contextmanager
def _random_states_kept(layout: Layout) -> Iterator[None]:
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


@contextlib.contextmanager
def _seen_as(when: str) -> Iterator[None]:
    """What the optimizer's own code raises is what was seen."""
    try:
        yield
    except (UnfitError, TwinError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise UnfitError(f"it raised {type(error).__name__}: {text[:200]} ({when}).") from error
