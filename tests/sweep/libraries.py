"""``python -m tests.sweep.libraries timm``, or ``diffusers``: one model of each family through all forms.

On the meta device, where a model of any size takes no memory and no time but Python's: what is tried is whether layers
are selected, change form, are called, and get gradients, in every form. That a form computes the right function is
tried on models with values (``tests/targets/test_other_libraries.py``).
"""

import argparse
import contextlib
import inspect
import itertools
import json
import logging
import re
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_drt import DRTConfig, DynamicRank

PASSED, NOTHING, UNBUILT, FAILED = "passed", "nothing to select", "not built", "failed"
UNFED, LATE = "no input known", "no result in time"
OUTCOMES = (PASSED, UNFED, NOTHING, UNBUILT, LATE, FAILED)
SCHEDULE = "factored@0 dense@1 adapter@2"


@dataclass
class Result:
    """What came of one family.

    Attributes:
        outcome: One of :data:`OUTCOMES`; 'no input known': its layers have changed form, but the dense model took none
            of the inputs that were tried.
        facts: ``targets``, ``share`` (of the parameters that they hold), ``dense`` (other layers, by reason),
            ``reached`` (targets with a gradient).
    """

    family: str
    model: str
    outcome: str
    cause: str = ""
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


class _TooLate(BaseException):
    """Not an Exception, which a model's own code may catch."""


def _stop(*args: Any) -> None:
    raise _TooLate


def attempt(family: str, name: str, make: Callable[[str], nn.Module], feeds: Callable[[nn.Module], Iterator]) -> Result:
    """Try one family."""
    result, started = Result(family, name, UNBUILT), time.perf_counter()
    try:
        with torch.device("meta"):
            model = make(name).eval()
        _cycle(result, model, feeds)
    except _TooLate:
        result.outcome = LATE
    except Exception as error:
        result.cause = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    result.seconds = round(time.perf_counter() - started, 1)
    return result


def _cycle(result: Result, model: nn.Module, feeds: Callable[[nn.Module], Iterator]) -> None:
    result.outcome = FAILED
    config = DRTConfig(schedule=SCHEDULE, rank_multiple=1, rank_ratio=0.1)
    try:
        drt = DynamicRank(model, config, max_steps=3)
    except ValueError as error:
        if "no layer to train" not in str(error):
            raise
        result.outcome, result.cause = NOTHING, str(error).partition("left out as follows: ")[2].partition(". incl")[0]
        return
    total = sum(p.numel() for p in model.parameters())
    held = sum(drt.copies[name][0] * shape.d_out * shape.d_in for name, shape in drt.targets.items())
    result.facts = {
        "targets": len(drt.targets),
        "share": round(held / total, 4),
        "dense": dict(Counter(drt.skipped.values())),
    }
    feed = next((feed for feed in feeds(model) if _takes(model, feed)), None)
    for index, phase in enumerate(drt.plan.phases):
        drt.empty_phase(index)
        if feed is not None and phase.kind == "factored":
            result.facts["reached"] = _reached(model, feed, list(drt.targets))
        elif feed is not None and not _takes(model, feed):
            raise ValueError(f"its forward pass fails in {phase.kind} form, and not as it was built")
    result.outcome = UNFED if feed is None else PASSED


def _takes(model: nn.Module, feed: dict[str, Any]) -> bool:
    try:
        with torch.no_grad(), torch.device("meta"):
            return any(True for _ in _tensors(model(**feed)))
    except Exception:
        return False


def _reached(model: nn.Module, feed: dict[str, Any], names: list[str]) -> int:
    """How many layers a backward pass reaches.

    Raises:
        ValueError: None at all.
    """
    model.zero_grad(set_to_none=True)
    with torch.device("meta"):
        outputs = [t for t in _tensors(model(**feed)) if t.requires_grad]
        torch.autograd.backward([t.sum() for t in outputs])
    reached = sum(any(p.grad is not None for p in model.get_submodule(name).parameters()) for name in names)
    if not reached:
        raise ValueError("no target layer has got a gradient")
    return reached


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from itertools.chain.from_iterable(map(_tensors, value.values()))
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(_tensors, value))
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


# ---- timm

_SMALL = (
    "test_",
    "atto",
    "femto",
    "pico",
    "zepto",
    "nano",
    "xxs",
    "_xs",
    "micro",
    "mini",
    "tiny",
    "small",
    "_s",
    "18",
    "b0",
)


def timm_families() -> dict[str, str]:
    """The smallest model, by its name, of each module of timm that has models."""
    import timm

    found = {}
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        order = [next((i for i, mark in enumerate(_SMALL) if mark in name), len(_SMALL)) for name in names]
        found |= {module: names[order.index(min(order))]} if names else {}
    return found


def timm_model(name: str) -> nn.Module:
    """With random weights, and two blocks where the number is one setting."""
    import timm

    with contextlib.suppress(Exception):
        return timm.create_model(name, pretrained=False, depth=2)
    return timm.create_model(name, pretrained=False)


def timm_feeds(model: Any) -> Iterator[dict[str, Any]]:
    """One picture, of the size that the model is made for, under the name of its forward's first argument."""
    name = next(iter(inspect.signature(model.forward).parameters))
    size = tuple(model.default_cfg.get("input_size", (3, 224, 224)))
    for shape in (size, (3, 224, 224), (3, 256, 256)):
        yield {name: torch.empty(2, *shape, device="meta")}


# ---- diffusers

_DEPTHS = re.compile(r"num_(\w+_)?layers|n_layers|depth")
_WIDTHS = re.compile(
    r"(cross|joint)_attention_dim|caption_channels|\w*hidden_(size|dim)|(text|cap|context|cond|image)_\w*dim|\w*embed_dim"
)
_OFFERED = ("encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "class_labels")


def diffusers_families() -> dict[str, str]:
    """Every model class."""
    import diffusers
    from diffusers import ModelMixin

    found = {}
    for name in sorted(dir(diffusers)):
        with contextlib.suppress(Exception):  # classes of optional packages
            cls = getattr(diffusers, name)
            if isinstance(cls, type) and issubclass(cls, ModelMixin) and cls is not ModelMixin:
                found[name] = name
    return found


def diffusers_model(name: str) -> nn.Module:
    """With its default configuration, but two layers of a kind where it says how many."""
    import diffusers

    cls = getattr(diffusers, name)
    defaults = inspect.signature(cls.__init__).parameters
    depths = {
        n: 2 for n, p in defaults.items() if _DEPTHS.fullmatch(n) and isinstance(p.default, int) and p.default > 2
    }
    try:
        return cls(**depths)
    except Exception:
        return cls()


def diffusers_feeds(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs by the names of the arguments and the numbers of the configuration, several shapes of each."""
    config, parameters = dict(model.config), inspect.signature(model.forward).parameters
    channels = config.get("in_channels") or (3 if "Autoencoder" in type(model).__name__ else 4)
    channels = channels[0] if isinstance(channels, (list, tuple)) else channels
    widths = [v for k, v in config.items() if _WIDTHS.fullmatch(k) and isinstance(v, int) and not isinstance(v, bool)]
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    first = needed[0] if needed else next(iter(parameters))
    others = list(dict.fromkeys([*needed, *(name for name in _OFFERED if name in parameters)]))
    pictures = [
        (channels, 32, 32),
        (channels, 64, 64),
        (channels, 9, 32, 32),
        (channels, 1, 32, 32),
        (9, channels, 32, 32),
    ]
    tokens = [(16, width) for width in dict.fromkeys([channels, *widths[:3]])]
    for width, shape in itertools.product(
        list(dict.fromkeys(widths))[:3] or [32], [*pictures, *tokens, (channels, 256)]
    ):
        given = {name: _guess(name, width, config) for name in others if name != first}
        yield {first: torch.empty(2, *shape, device="meta"), **given}


def _guess(name: str, width: int, config: dict[str, Any]) -> Tensor:
    """What an argument of this name mostly is, for a batch of two and a text of eight tokens."""
    axes = len(config.get("axes_dims_rope") or config.get("axes_dim") or (0, 0, 0))
    pooled = config.get("pooled_projection_dim") or config.get("projection_class_embeddings_input_dim") or 768
    kinds = (
        ("img_ids", (16, axes), torch.float), ("txt_ids", (8, axes), torch.float), ("pooled", (2, pooled), torch.float),
        ("mask", (2, 8), torch.bool), ("time", (2,), torch.float), ("guidance", (2,), torch.float),
        ("labels", (2,), torch.long), ("size|coords", (2, 2), torch.float), ("ids", (2, 8), torch.long),
        ("controlnet_cond", (2, 3, 256, 256), torch.float),
    )  # fmt: skip
    shape, dtype = next(
        ((shape, dtype) for kind, shape, dtype in kinds if re.search(kind, name)), ((2, 8, width), None)
    )
    return torch.ones(shape, dtype=dtype, device="meta")


LIBRARIES = {
    "timm": (timm_families, timm_model, timm_feeds),
    "diffusers": (diffusers_families, diffusers_model, diffusers_feeds),
}


def main(arguments: list[str] | None = None) -> int:
    """Sweep a library and print the table; 2 if no family is named."""
    parser = argparse.ArgumentParser(prog="python -m tests.sweep.libraries", description=__doc__.partition("\n")[0])
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("--only", metavar="REGEX", default="", help="families in which it is found")
    parser.add_argument("--output", type=Path, help="one JSON line a family; by default sweep_LIBRARY.jsonl")
    parser.add_argument("--resume", action="store_true", help="keep what --output says of families, try the rest")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for one family")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGALRM, _stop)
    families, make, feeds = LIBRARIES[options.library]
    names = {family: name for family, name in families().items() if re.search(options.only, family)}
    if not names:
        print(f"--only {options.only!r} matches no family of {options.library}.", file=sys.stderr)
        return 2
    path = options.output or Path(f"sweep_{options.library}.jsonl")
    done = {r.family: r for r in _stored(path)} if options.resume else {}
    with path.open("a" if options.resume else "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        for family in [family for family in names if family not in done]:
            signal.alarm(options.timeout)
            done[family] = result = attempt(family, names[family], make, feeds)
            signal.alarm(0)
            file.write(json.dumps(asdict(result)) + "\n")
            file.flush()
        logging.disable(logging.NOTSET)
    print(table([done[family] for family in names]))
    return 0


def _stored(path: Path) -> list[Result]:
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def table(results: list[Result]) -> str:
    """Counts by outcome, the causes, and why layers of passed families stay dense."""
    counts = Counter(result.outcome for result in results)
    rows = ["| outcome | families |", "|---|---|", *(f"| {outcome} | {counts[outcome]} |" for outcome in OUTCOMES)]
    causes = [f"| {r.family} ({r.model}) | {r.outcome} | {r.cause} |" for r in results if r.outcome != PASSED]
    reasons: Counter[str] = Counter()
    for result in results:
        reasons.update(result.facts.get("dense", {}))
    dense = [f"| {reason} | {count} |" for reason, count in reasons.most_common()]
    parts = [
        rows,
        ["| family | outcome | cause |", "|---|---|---|", *causes],
        ["| dense for | layers |", "|---|---|", *dense],
    ]
    return "\n\n".join("\n".join(part) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
