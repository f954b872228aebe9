"""Exchange with the Hub and other libraries: native checkpoints, PEFT adapters, model cards."""

from hf_drt.hub.quantizer import NativeConfig, NativeQuantizer, register_native_format

__all__ = ["NativeConfig", "NativeQuantizer", "register_native_format"]
