"""The format linear-pairs: factored layers as two linear layers each, and the code that loads them without hf_drt."""

from hf_drt.export.pairs.code import FILE_NAME, RANKS, paired_base, paired_class
from hf_drt.export.pairs.exporter import LinearPairsExporter, save_linear_pairs

__all__ = ["FILE_NAME", "RANKS", "LinearPairsExporter", "paired_base", "paired_class", "save_linear_pairs"]
