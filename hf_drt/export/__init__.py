"""The model as the user gets it: dense, native, a PEFT adapter, linear pairs, and its card."""

from hf_drt.export.card import PhaseSummary, RunSummary, complete_card, renew_card
from hf_drt.export.dense import DenseExporter
from hf_drt.export.exporter import Exporter, Saving
from hf_drt.export.leftovers import model_files, set_aside
from hf_drt.export.merge import (
    dense_state_dict,
    dense_weight,
    low_rank_layers,
    marked_state_dict,
    merge_errors,
    presented,
)
from hf_drt.export.native import NativeConfig, NativeExporter
from hf_drt.export.pairs import RANKS, LinearPairsExporter, paired_base, paired_class, save_linear_pairs
from hf_drt.export.peft import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterExporter,
    base_state_dict,
    load_peft_adapter,
    save_peft_adapter,
)
from hf_drt.export.saving import check_export, check_written, save_export
from hf_drt.export.written import Written

__all__ = [
    "CONFIG_NAME",
    "RANKS",
    "WEIGHTS_NAME",
    "AdapterExporter",
    "DenseExporter",
    "Exporter",
    "LinearPairsExporter",
    "NativeConfig",
    "NativeExporter",
    "PhaseSummary",
    "RunSummary",
    "Saving",
    "Written",
    "base_state_dict",
    "check_export",
    "check_written",
    "complete_card",
    "dense_state_dict",
    "dense_weight",
    "load_peft_adapter",
    "low_rank_layers",
    "marked_state_dict",
    "merge_errors",
    "model_files",
    "paired_base",
    "paired_class",
    "presented",
    "renew_card",
    "save_export",
    "save_linear_pairs",
    "save_peft_adapter",
    "set_aside",
]
