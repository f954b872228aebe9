"""The model as the user gets it: dense, native, a PEFT adapter, and its card."""

from hf_drt.export.card import PhaseSummary, RunSummary, complete_card, renew_card
from hf_drt.export.dense import dense_state_dict, dense_weight, low_rank_layers, marked_state_dict, merge_errors
from hf_drt.export.exporting import check_export, dense_tensors, save_export
from hf_drt.export.leftovers import MODEL_FILES, set_aside
from hf_drt.export.native import NativeConfig, register_native_format
from hf_drt.export.peft.files import CONFIG_NAME, WEIGHTS_NAME
from hf_drt.export.peft.load import load_peft_adapter
from hf_drt.export.peft.save import base_state_dict, save_peft_adapter

__all__ = [
    "CONFIG_NAME",
    "MODEL_FILES",
    "WEIGHTS_NAME",
    "NativeConfig",
    "PhaseSummary",
    "RunSummary",
    "base_state_dict",
    "check_export",
    "complete_card",
    "dense_state_dict",
    "dense_tensors",
    "dense_weight",
    "load_peft_adapter",
    "low_rank_layers",
    "marked_state_dict",
    "merge_errors",
    "register_native_format",
    "renew_card",
    "save_export",
    "save_peft_adapter",
    "set_aside",
]
