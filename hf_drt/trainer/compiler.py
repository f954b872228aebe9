"""What the compiler keeps over a change of form."""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DynamoBackend
from accelerate.utils.other import has_repeated_blocks, is_repeated_blocks
from torch import nn

from hf_drt.schedule import Plan

logger = logging.getLogger(__name__)
_REGIONAL = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"


def compiler() -> Any:
    """Accelerate's plugin for the compiler of the run that has been set up last, be it asked for by the arguments or
    by the launcher; None where nothing compiles."""
    plugin: Any = getattr(AcceleratorState(), "dynamo_plugin", None) if is_initialized() else None
    return None if plugin is None or plugin.backend == DynamoBackend.NO else plugin


class CompiledGraphs:
    """The graphs of a compiled model, over its changes of form.

    A model compiled as a whole is another one after a switch, and its graphs are dropped: they would count against
    dynamo's limit on recompilations, past which it runs eagerly in silence. Blocks compiled one by one (Accelerate's
    regional compilation) have graphs of their own, which stay: only blocks in forms that no block of their class has
    had are compiled. The limit grows by dynamo's own at each switch. After training it is as it was, and the graphs,
    which may be more than it allows, are dropped.

    Args:
        regional: Whether blocks are compiled one by one.
    """

    def __init__(self, regional: bool):
        self.regional = regional
        self._hinted = False
        self._limits: tuple[int, int] | None = None

    @classmethod
    def found(cls) -> "CompiledGraphs | None":
        """Those of the run that has been set up last; None where nothing compiles."""
        plugin = compiler()
        return None if plugin is None else cls(bool(plugin.use_regional_compilation))

    def switched(self, plan: Plan) -> None:
        """The model has changed form, by a plan."""
        if not self.regional:
            torch._dynamo.reset()
            self._hint(plan)
            return
        config: Any = torch._dynamo.config
        if self._limits is None:
            self._limits = config.recompile_limit, config.accumulated_recompile_limit
        config.recompile_limit += self._limits[0]
        config.accumulated_recompile_limit += self._limits[1]

    def leave(self) -> None:
        """Training is over."""
        if self._limits is not None:
            config: Any = torch._dynamo.config
            config.recompile_limit, config.accumulated_recompile_limit = self._limits
            self._limits = None
            torch._dynamo.reset()

    def _hint(self, plan: Plan) -> None:
        """Say once what would compile less, where phases change some of the layers alone."""
        if not self._hinted and any(phase.parts for phase in plan.phases):
            logger.info(
                "torch_compile compiles the whole model at each of %d switches. With the environment variable "
                "%s=true it compiles block by block, and at a switch only blocks in forms that none has had.",
                len(plan.phases) - 1,
                _REGIONAL,
            )
        self._hinted = True


def refuse_regions(model: nn.Module, names: Iterable[str]) -> None:
    """Raise where blocks are compiled one by one, and a layer that changes form is in none of them.

    Accelerate's blocks are what stands in lists of modules of one class, which need not be those of our selection. What
    holds them is copied, and the copy goes on calling the layer that it has found.

    Raises:
        ValueError: Names such a layer.
    """
    plugin = compiler()
    if plugin is None or not plugin.use_regional_compilation:
        return
    if name := next((name for name in names if _is_region(model, name)), None):
        raise ValueError(
            f"{name} is in none of the blocks that Accelerate's regional compilation finds (lists of modules of one "
            "class), so that the model would go on computing with what it is now, whatever form it takes. Keep it as "
            f"it is (drt_exclude), or compile the model as a whole: unset {_REGIONAL}."
        )


def _is_region(model: nn.Module, name: str) -> bool:
    """Whether Accelerate compiles this very layer, and not a module around it."""
    module, parts = model, name.split(".")
    for place, part in enumerate(parts, 1):
        blocks = is_repeated_blocks(module)
        if not blocks and not has_repeated_blocks(module):
            return False
        module = getattr(module, part)
        if blocks:
            return place == len(parts)
    return True
