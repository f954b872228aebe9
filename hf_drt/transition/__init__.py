"""A change of form of many layers: prepared as a whole, put in force layer by layer."""

from hf_drt.transition.change import Transition, change_forms, empty_forms
from hf_drt.transition.function_error import FunctionError

__all__ = [
    "FunctionError",
    "Transition",
    "change_forms",
    "empty_forms",
]
