"""The optimizers of bitsandbytes, each in 32 bits, in 8 bits, and paged.

In 8 bits the state of a weight of 4,096 elements or more is kept in codes, each block of 256 with a scale of its own,
and begins anew at a switch. In 32 bits it follows.

GlobalOptimManager has settings of single weights, such as the Trainer's word that embeddings have 32 bits. It knows
them by identity, and by place in the groups of any optimizer of the process: places that a switch gives to others.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import MomentKeys, OptimizerRule, Replaced, Shape

_BLOCK, _CODES = 256, 256
_FIRST, _SECOND = MomentKeys(("state1",)), MomentKeys(second=("state1",))
_BOTH = MomentKeys(("state1",), ("state2",))
_8, _32 = {"optim_bits": 8}, {"optim_bits": 32}
_TESTED = "bitsandbytes 0.50.2"


def _in_32_bits(optimizer: Any) -> bool:
    return optimizer.args.optim_bits == 32


def _shape(key: str, shape: Shape, averages: int) -> Shape:
    """``averages`` first moments lie in one entry, in front of whose shape their number stands if there are several."""
    several = (averages,) if averages > 1 else ()
    blocks = -(-torch.Size(shape).numel() // _BLOCK)
    shapes: dict[str, Shape] = {
        "state1": (*several, *shape), "absmax1": (*several, blocks), "absmax2": (blocks,), "qmap1": (_CODES,),
        "qmap2": (_CODES,), "unorm_vec": (1,),
    }  # fmt: skip
    return shapes.get(key, shape)


def _handed_on(optimizer: Any, changes: list[Replaced]) -> None:
    """Settings of single weights go to those that take their place, and places are forgotten, since the identity says
    the same. Paged state of the old weights is let go."""
    own = optimizer.mng.pid2config
    for old, new in changes:
        found = [config for weight in old if (config := own.pop(id(weight), None)) is not None]
        for weight in new:
            own.update({id(weight): dict(config) for config in found[:1]})
    groups = len(optimizer.param_groups)
    optimizer.mng.index2config = {at: c for at, c in optimizer.mng.index2config.items() if at[0] >= groups}
    left = {id(value) for old, _ in changes for weight in old for value in optimizer.state.get(weight, {}).values()}
    paged = optimizer.page_mng.paged_tensors
    paged[:] = [tensor for tensor in paged if id(tensor) not in left]


def _remembered(optimizer: Any) -> Callable[[], None]:
    own, places, paged = optimizer.mng.pid2config, optimizer.mng.index2config, optimizer.page_mng.paged_tensors
    settings, pages = {key: dict(config) for key, config in own.items()}, list(paged)

    def restore() -> None:
        own.clear()
        own.update(settings)
        optimizer.mng.index2config = places
        paged[:] = pages

    return restore


def _add(
    module: str,
    classes: Iterable[str],
    help: str,
    moments: MomentKeys,
    optim: Mapping[str, Mapping[str, Any]] | None = None,
    averages: int = 1,
) -> None:
    rule = OptimizerRule(
        help,
        moments,
        optim or {},
        keeps=_in_32_bits,
        anew="state in 8 bits",
        tested=_TESTED,
        state_shape=partial(_shape, averages=averages),
        handed_on=_handed_on,
        remembered=_remembered,
    )
    for name in classes:
        OPTIMIZERS.add(f"bitsandbytes.optim.{module}.{name}", rule)


def _variants(name: str, paged: bool = False) -> list[str]:
    names = [name, f"{name}8bit", f"{name}32bit"]
    return names + [f"Paged{each}" for each in names] if paged else names


_add("adam", _variants("Adam", paged=True), "bitsandbytes' Adam", _BOTH)
_add(
    "adamw",
    _variants("AdamW", paged=True),
    "bitsandbytes' AdamW",
    _BOTH,
    {
        "adamw_8bit": _8, "adamw_bnb_8bit": _8, "paged_adamw_8bit": _8 | {"is_paged": True},
        "paged_adamw_32bit": _32 | {"is_paged": True},
    },
)  # fmt: skip
_add(
    "ademamix",
    ["AdEMAMix", "AdEMAMix8bit", "PagedAdEMAMix", "PagedAdEMAMix8bit"],
    "bitsandbytes' AdEMAMix, with a fast and a slow average of gradients",
    _BOTH,
    {
        "ademamix": _32, "ademamix_8bit": _8, "paged_ademamix_32bit": _32 | {"is_paged": True},
        "paged_ademamix_8bit": _8 | {"is_paged": True},
    },
    averages=2,
)  # fmt: skip
_add(
    "lion",
    _variants("Lion", paged=True),
    "bitsandbytes' Lion",
    _FIRST,
    {
        "lion_32bit": _32, "lion_8bit": _8, "paged_lion_32bit": _32 | {"is_paged": True},
        "paged_lion_8bit": _8 | {"is_paged": True},
    },
)  # fmt: skip
_add(
    "rmsprop",
    _variants("RMSprop"),
    "bitsandbytes' RMSprop",
    _SECOND,
    {"rmsprop_bnb": _32, "rmsprop_bnb_32bit": _32, "rmsprop_bnb_8bit": _8},
)
_add("sgd", _variants("SGD"), "bitsandbytes' SGD with momentum", _FIRST)
_add("adagrad", _variants("Adagrad"), "bitsandbytes' Adagrad", _SECOND)
_add("lamb", _variants("LAMB"), "bitsandbytes' LAMB", _BOTH)
_add("lars", _variants("LARS"), "bitsandbytes' LARS", _FIRST)

for _name in ("AdEMAMix32bit", "PagedAdEMAMix32bit"):
    OPTIMIZERS.add(
        f"bitsandbytes.optim.ademamix.{_name}",
        OptimizerRule(
            "bitsandbytes' AdEMAMix in 32 bits",
            refused="it has room for one of its two averages, and its first step fails. Use AdEMAMix(optim_bits=32).",
            tested=_TESTED,
        ),
    )
