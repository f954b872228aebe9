"""What the compiler keeps over a change of form."""

import logging
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import Trainer

from hf_drt.schedule import Plan

logger = logging.getLogger(__name__)


class CompiledGraphs:
    """The graphs of a compiled model, over its changes of form.

    A model compiled as a whole is another one after a switch, and its graphs are dropped: they would count against
    dynamo's limit on recompilations, past which it runs eagerly in silence. Blocks compiled one by one (Accelerate's
    regional compilation) have graphs of their own, which stay: only blocks in forms that no block of their class has
    had are compiled. The limit grows by dynamo's own at each switch, and is as it was after training.

    Args:
        regional: Whether blocks are compiled one by one.
    """

    def __init__(self, regional: bool):
        self.regional = regional
        self._hinted = False
        self._limits: tuple[int, int] | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> "CompiledGraphs | None":
        """Those of a trainer's model; None where nothing compiles it, be it by the arguments or by the launcher."""
        plugin: Any = trainer.accelerator.state.dynamo_plugin
        return None if plugin.backend == DynamoBackend.NO else cls(bool(plugin.use_regional_compilation))

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

    def _hint(self, plan: Plan) -> None:
        """Say once what would compile less, where phases change some of the layers alone."""
        if not self._hinted and any(phase.parts for phase in plan.phases):
            logger.info(
                "torch_compile compiles the whole model at each of %d switches. With the environment variable "
                "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION=true it compiles block by block, and at a switch only "
                "blocks in forms that none has had.",
                len(plan.phases) - 1,
            )
        self._hinted = True
