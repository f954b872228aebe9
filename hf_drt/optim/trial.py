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
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_drt.optim.trial_run import Layout, Run, random_states_kept, small_layout
from hf_drt.optim.twin import TwinError

STEPS, AFTER = 400, 12
"""Steps before the exchange, by which bias corrections fade, and after it; what is done every 10 steps is in both."""
FACTOR = 1.5
"""Within which a first update is of like size."""


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
        bare: What stands against parameters without a gradient; empty if nothing does.
    """

    kept: tuple[str, ...]
    shaped: frozenset[str]
    reads_rate: bool
    apart: str
    bare: str


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
    layout = small_layout(optimizer)
    if not any(layout):
        raise UnfitError("its groups hold no parameters.")
    with random_states_kept(layout):
        try:
            return _trial(optimizer, layout)
        except TwinError as error:
            raise UnfitError(str(error)) from error


def _trial(optimizer: torch.optim.Optimizer, layout: Layout) -> Findings:
    run, undisturbed = Run(optimizer, layout), Run(optimizer, layout)
    started = run.counts()
    with _seen_as("in the steps of a parameter without state"):
        for _ in range(STEPS):
            run.step()
            undisturbed.step()
    counts = {key for key, value in run.counts().items() if value != started.get(key)}
    with _seen_as(f"once a parameter had been replaced after {STEPS} steps"):
        old, new = run.exchange()
        fresh = Run(optimizer, run.layout())
        fresh.begin_anew(counts)
        _check_new(run, undisturbed, fresh, old, new)
        _check_others(optimizer, run, undisturbed)
        _check_let_go(run, old)
    with _seen_as("as its state was saved and loaded"):
        _check_resumes(optimizer, run)
    with _seen_as("with twice its lr"):
        reads_rate = _reads_rate(optimizer, layout)
    return Findings(*run.state_names(), reads_rate, _apart(optimizer, layout), _bare(optimizer, layout))


def _check_new(run: "Run", undisturbed: "Run", fresh: "Run", old: list[nn.Parameter], new: list[str]) -> None:
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


def _check_others(optimizer: torch.optim.Optimizer, run: "Run", undisturbed: "Run") -> None:
    now, usual = run.values(), undisturbed.values()
    stayed = now.keys() & usual.keys()
    if (share := _difference({key: now[key] for key in stayed}, usual)) and not _draws(optimizer, run.layout()):
        raise UnfitError(
            f"parameters that stayed trained otherwise than without the exchange, by up to {share:.1g} of their size."
        )


def _draws(optimizer: torch.optim.Optimizer, layout: Layout) -> bool:
    """Whether its steps draw random numbers, as for stochastic rounding: an exchange moves on what others get then."""
    one, other = Run(optimizer, layout), Run(optimizer, layout)
    other.steps = STEPS
    for each in (one, other):
        each.train(AFTER)
    return _difference(one.values(), other.values()) > 0


def _check_let_go(run: "Run", old: list[nn.Parameter]) -> None:
    references = [weakref.ref(p) for p in old]
    old.clear()
    if any(reference() is not None for reference in references):
        gc.collect()
    if any(reference() is not None for reference in references):
        raise UnfitError(f"it keeps a replaced parameter alive, {AFTER} steps after its group and its state let it go.")


def _check_resumes(optimizer: torch.optim.Optimizer, run: "Run") -> None:
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(file):
        raise UnfitError(
            f"its state_dict holds {', '.join(foreign)}, which torch.load(weights_only=True) refuses, as a resume does."
        )
    file.seek(0)
    other = Run(optimizer, run.layout(), run)
    other.optimizer.load_state_dict(torch.load(file, weights_only=True))
    for each in (run, other):
        each.train(AFTER)
    if share := _difference(run.values(), other.values()):
        raise UnfitError(
            f"a fresh one that loaded its state_dict went on otherwise than itself, by up to {share:.1g} of a "
            "parameter's size: some of its state is kept outside its state_dict."
        )


def _reads_rate(optimizer: torch.optim.Optimizer, layout: Layout) -> bool:
    one, other = Run(optimizer, layout), Run(optimizer, layout)
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
    run = Run(optimizer, layout)
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


def _bare(optimizer: torch.optim.Optimizer, layout: Layout) -> str:
    """What it does where the first parameter of each group has no gradient."""
    run = Run(optimizer, layout)
    bare = [next(iter(group)) for group in layout if group]
    starts = run.values()
    try:
        with _seen_as("with a parameter that has no gradient"):
            for _ in range(2):
                run.step(without=bare)
    except UnfitError as error:
        return str(error)
    moved = [key for key in bare if not torch.equal(run.values()[key], starts[key])]
    return "it moved a parameter that has no gradient." if moved else ""


def _difference(now: Mapping[str, Tensor], usual: Mapping[str, Tensor]) -> float:
    """Largest difference of parameters, as a share of their size; 0 where all bits are equal."""
    changed = (key for key in now if not torch.equal(now[key], usual[key]))
    return max((_distance(now[key], usual[key]) / max(_distance(usual[key], 0), 1e-30) for key in changed), default=0)


def _distance(a: Tensor, b: Tensor | float) -> float:
    return float((a.double() - b).norm())


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
