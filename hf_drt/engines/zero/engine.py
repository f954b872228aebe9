"""DeepSpeed's ZeRO: the engine is taken apart before a change of form and made anew after it.

Its optimizer lays parameters out in flat tensors when it is made, and hangs hooks on the modules that it finds. So the
engine is destroyed at a switch (:mod:`hf_drt.engines.zero.renewal`). Layers change form one at a time in between: each
is gathered as a whole, in float32, and its new parameters are shared out again before the next one.
"""

import contextlib
import copy
from typing import Any, cast

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from hf_drt.engines.decompose import raise_everywhere
from hf_drt.engines.engine import Engine
from hf_drt.engines.registry import ENGINES
from hf_drt.engines.zero.layout import is_partitioned, placeholder, shaped, span, write_partition
from hf_drt.engines.zero.renewal import OPENED, renewed
from hf_drt.engines.zero.shard import Shard, chunk


class Zero(Engine):
    """A process holds a part of the optimizer's state and of the float32 weights; under ZeRO-3 of the model too."""

    help = "DeepSpeed, ZeRO-1 to 3: a process holds a part of the optimizer's state, under ZeRO-3 of the model too"
    sharded = True

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._opened = OPENED.get(model)
        self._partitioned = next(filter(is_partitioned, model.parameters()), None)
        self.computes_in_switch = self._partitioned is None  # the hooks that gather weights are gone

    @classmethod
    def manages(cls, model: nn.Module) -> bool:
        return isinstance(model, DeepSpeedEngine) or model in OPENED or any(map(is_partitioned, model.parameters()))

    @classmethod
    def inside(cls, module: nn.Module) -> nn.Module | None:
        return cast(Any, module).module if isinstance(module, DeepSpeedEngine) else None

    @classmethod
    def trainer_settings(cls) -> dict[str, dict[str, Any]]:
        """Its three stages; in buckets that hold a few of the weights, and under ZeRO-3 every weight is partitioned."""
        zero = {"reduce_bucket_size": 4096, "allgather_bucket_size": 4096}
        whole = {"stage3_gather_16bit_weights_on_model_save": True}
        parts = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 4096}
        return {
            f"zero{stage}": {
                "deepspeed": {
                    "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
                    "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
                    "zero_optimization": {"stage": stage} | zero | (whole | parts if stage == 3 else {}),
                }
            }
            for stage in (1, 2, 3)
        }  # fmt: skip

    # ---- what a process holds

    def held(self, tensor: Any) -> Tensor:
        return tensor.ds_tensor if is_partitioned(tensor) else tensor

    def full(self, value: Any) -> Any:
        if isinstance(value, Shard):
            return value.whole()
        return self._gathered(value) if isinstance(value, Tensor) and is_partitioned(value) else value

    def whole(self, layer: nn.Module) -> nn.Module:
        """The layer with whole parameters, where the engine is taken apart in float32."""
        if self._opened is None and self._partitioned is None:
            return layer
        plain = copy.copy(layer)
        plain._parameters = {
            name: None if p is None else nn.Parameter(self._value(p), requires_grad=p.requires_grad)
            for name, p in layer._parameters.items()
        }
        return plain

    @torch.no_grad()
    def _value(self, parameter: nn.Parameter) -> Tensor:
        masters = {} if self._opened is None else self._opened.masters
        if is_partitioned(parameter) or parameter.dtype != torch.float32:
            whole = masters[parameter].whole() if parameter in masters else self._gathered(parameter)
            return whole if self._opened is None else whole.float()
        return parameter.detach()

    def _gathered(self, parameter: Any) -> Tensor:
        """What the model computes with, as a whole. Collective under ZeRO-3."""
        if not is_partitioned(parameter):
            return parameter.detach()
        has_shape = parameter.numel() > 0
        with GatheredParameters([parameter]):
            whole = parameter.detach().clone()
        if has_shape and parameter.numel() == 0:
            placeholder(parameter)
        return whole

    def like(self, value: Any, weight: Tensor) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        return Shard.of(value, *self._span(weight))

    @staticmethod
    def _span(parameter: Tensor) -> tuple[int, int]:
        return span(parameter) if is_partitioned(parameter) else chunk(parameter.numel())

    def readable(self) -> contextlib.AbstractContextManager[None]:
        return shaped(self.model)

    # ---- a change of form

    def admit(self, layers: list[nn.Module]) -> None:
        """Any layer can be replaced while the engine is taken apart."""

    def agree(self, error: Exception | None) -> None:
        """Another process holds other values, and finds other faults."""
        raise_everywhere(error, next(self.model.parameters()).device)

    @torch.no_grad()
    def install(self, old: nn.Module, plain: nn.Module, new: nn.Module) -> None:
        """Give the parameters of ``new`` the model's precision, share them out, and keep their float32 values."""
        pairs = [(plain._parameters[name], p) for name, p in old._parameters.items() if p is not None]
        by_plain = {id(whole): p for whole, p in pairs}
        dtype = next(p.dtype for _, p in pairs if p.is_floating_point())
        for name, value in new._parameters.items():
            if value is not None:
                kept = by_plain.pop(id(value), None)
                parameter = self._made(value, dtype) if kept is None else self._kept(value, kept)
                new._parameters[name] = parameter
                self._remember(parameter, value)
        for dropped in by_plain.values():
            self._remember(dropped, None)

    def _made(self, value: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        parameter = nn.Parameter(value.detach().to(dtype), requires_grad=value.requires_grad)
        if self._partitioned is not None:
            self._partitioned.convert_to_zero_parameters(param_list=[parameter])  # type: ignore[reportAttributeAccessIssue]
            placeholder(parameter)
        return parameter

    def _kept(self, value: nn.Parameter, kept: nn.Parameter) -> nn.Parameter:
        if is_partitioned(kept):
            write_partition(kept, value)
        else:
            kept.copy_(value)
        kept.grad = None
        kept.requires_grad_(value.requires_grad)
        return kept

    def _remember(self, parameter: nn.Parameter, whole: Tensor | None) -> None:
        if self._opened is None:
            return
        if whole is None or not parameter.requires_grad:
            self._opened.masters.pop(parameter, None)
        else:
            self._opened.masters[parameter] = Shard.of(whole.float(), *self._span(parameter))

    def settle(self) -> None:
        """What was shared out stays so until the engine is made anew."""

    def around_switch(self, options: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
        return renewed(self.model) if isinstance(self.model, DeepSpeedEngine) else shaped(self.model)


ENGINES.add("zero", Zero)
