"""Layers in adapter form as a LoRA checkpoint of the PEFT library, and such a checkpoint as adapter form.

Both are ``W + s B A`` with the same order of operations. Only the two files of the format are read and written:
of PEFT itself only the matching of patterns is used, where it is installed.
"""

from hf_drt.export.peft.exporter import AdapterExporter
from hf_drt.export.peft.files import CONFIG_NAME, WEIGHTS_NAME
from hf_drt.export.peft.load import load_peft_adapter
from hf_drt.export.peft.save import base_state_dict, check_adapters, save_peft_adapter, write_adapter

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "AdapterExporter",
    "base_state_dict",
    "check_adapters",
    "load_peft_adapter",
    "save_peft_adapter",
    "write_adapter",
]
