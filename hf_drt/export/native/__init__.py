"""The native format: checkpoints in low-rank form, written by the exporter and loaded by way of transformers."""

from hf_drt.export.native.exporter import NativeExporter
from hf_drt.export.native.quantizer import NativeConfig, NativeQuantizer, register_native_format

__all__ = ["NativeConfig", "NativeExporter", "NativeQuantizer", "register_native_format"]
