"""Native loading, by way of transformers' registry of quantizers.

Nothing is quantized: the registry is the one place where a package may replace layers of any model between its
construction and the loading of its weights, whichever class or pipeline loads it.

``import hf_drt`` makes the format known (:mod:`hf_drt.native_format`); this module is imported when it is met.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_drt.checkpoint import AGAIN, METHOD, CheckpointError, DeclaredLayer, declare, read_block
from hf_drt.export.native.names import candidates, matched
from hf_drt.export.native.weights import check_weights
from hf_drt.forms import AdapterLinear, LowRankLinear, empty_like, layer_of, split_attentions
from hf_drt.messages import some
from hf_drt.native_format import LOADED
from hf_drt.targets import Swap, replace, split_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NativeConfig(QuantizationConfigMixin):
    """The block ``quantization_config`` in the ``config.json`` of a native checkpoint.

    Raises:
        CheckpointError: It is of a newer format, or damaged.
    """

    def __init__(self, **block: Any):
        self.quant_method = METHOD
        self.format_version, self.layers = block.get("format_version"), block.get("layers")
        self.read()

    def read(self) -> list[DeclaredLayer]:
        """The layers that it declares."""
        return read_block(vars(self))


class NativeQuantizer(HfQuantizer):
    """Puts a checkpoint's low-rank layers into a model before its weights are loaded, and leaves no trace of itself.

    Raises:
        CheckpointError: By ``from_pretrained``: the checkpoint does not fit the model, or does not hold what it
            declares.
    """

    quantization_config: NativeConfig
    requires_calibration = True  # in transformers' terms: it cannot be asked to convert a dense checkpoint

    def update_weight_conversions(self, weight_conversions: list, model: nn.Module) -> list:
        """None: native checkpoints hold the names that the model has at run time."""
        return []

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise CheckpointError(
                "low-rank layers cannot be spread by tensor parallelism. Load the checkpoint without tp_plan and "
                "distributed_config."
            )
        declared = self.quantization_config.read()
        split_attention(model, [n for layer in declared for n in candidates(layer.name, model.base_model_prefix)])
        layers = [(name, layer, layer_of(model, name)) for name, layer in matched(model, declared).items()]
        if checkpoint_files and all(str(path).endswith(".safetensors") for path in checkpoint_files):
            check_weights(checkpoint_files, [(layer, module) for _, layer, module in layers], model.base_model_prefix)
        swaps = [Swap(name, module, empty_like(module, layer.form)) for name, layer, module in layers]
        replace(model, swaps)
        self._layers = {swap.name: swap.new for swap in swaps}
        for layer in self._layers.values():
            layer._is_hf_initialized = True  # else the model's _init_weights would write to its weight
        self._hide_empty_weights(model, [layer.name for layer in declared])

    def _hide_empty_weights(self, model: "PreTrainedModel", declared: list[str]) -> None:
        """Entries without elements under a dense weight's name stop a loader that does not know the format. This one
        passes over them: the model has no use for them, and they are not reported as unexpected."""
        modules = model.named_modules(remove_duplicate=False)
        own = {module.dense_key(name) for name, module in modules if isinstance(module, LowRankLinear)}
        own |= {attention.mark(f"{name}.") for name, attention in split_attentions(model)}
        names = {name for layer in declared for name in candidates(layer, model.base_model_prefix)}
        stored = {key for name in names for key in (name, f"{name}.weight")}  # the first, of fused experts

        def hide(module: nn.Module, state: dict[str, Any], root: str, metadata: dict[str, Any]) -> None:
            for name in own:
                state.pop(root + name, None)

        self._hook = model.register_state_dict_post_hook(hide)
        self._ignored = model._keys_to_ignore_on_load_unexpected
        patterns = {f"^{re.escape(name)}$" for name in own | stored}
        model._keys_to_ignore_on_load_unexpected = patterns.union(self._ignored or ())

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> "PreTrainedModel":
        self._hook.remove()
        model._keys_to_ignore_on_load_unexpected = self._ignored
        self._check_loaded()
        for layer in self._layers.values():
            del layer._is_hf_initialized
            if isinstance(layer, AdapterLinear):
                for frozen in set(layer.tensors) - set(layer.path):
                    layer.get_parameter(frozen).requires_grad_(False)
        # With the first three, the Trainer refuses the model, save_pretrained ignores its state_dict, and .float()
        # raises. Without the last, a model that becomes dense is saved under its architecture's published names.
        for mark in ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions"):
            vars(model).pop(mark, None)
        declare(model)
        LOADED.append(type(model).__name__)
        return model

    def _check_loaded(self) -> None:
        """Every tensor has come from the checkpoint, be it no safetensors file; transformers would only warn. Those
        that are still on the meta device are offloaded."""
        missing = [
            f"{name}.{tensor}"
            for name, layer in self._layers.items()
            for tensor, parameter in layer.named_parameters()
            if not parameter.is_meta and not getattr(parameter, "_is_hf_initialized", False)
        ]
        if missing:
            raise CheckpointError(
                f"the weights lack {some(missing)}, or hold them in another shape; config.json declares them. {AGAIN}"
            )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
