"""Native checkpoints: low-rank layers keep their form in files, and any ``from_pretrained`` loads them so."""

from hf_drt.hub.quantizer import NativeConfig, NativeQuantizer, register_native_format

__all__ = ["NativeConfig", "NativeQuantizer", "register_native_format"]
