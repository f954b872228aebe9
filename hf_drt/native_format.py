"""The native format's place in transformers' registry of quantizers, taken without an import."""

import importlib
from types import ModuleType
from typing import Any

METHOD = "hf_drt"  # ``quant_method`` in the config.json of a native checkpoint
LOADED: list[str] = []
"""Classes of the models that were loaded from native checkpoints in this process, in that order."""


class OnDemand:
    """A class of :mod:`hf_drt.export`, imported when it is first called, or asked for an attribute."""

    def __init__(self, name: str):
        self._name = name

    def _loaded(self) -> Any:
        return getattr(importlib.import_module("hf_drt.export.native"), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # a question of copy, pickle or inspect, not of a loader of models
            raise AttributeError(attribute)
        return getattr(self._loaded(), attribute)


def make_known(auto: ModuleType) -> None:
    """Enter the format in ``transformers.quantizers.auto``; doing it again is harmless."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, OnDemand("NativeConfig"))
    auto.AUTO_QUANTIZER_MAPPING.setdefault(METHOD, OnDemand("NativeQuantizer"))
