"""The native format: checkpoints in low-rank form, written by the exporter and loaded by way of transformers."""

from hf_drt.export.native.exporter import NativeExporter
from hf_drt.export.native.quantizer import NativeConfig, NativeQuantizer

__all__ = ["NativeConfig", "NativeExporter", "NativeQuantizer"]
