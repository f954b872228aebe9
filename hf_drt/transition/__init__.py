"""A change of form of many layers: prepared as a whole, put in force layer by layer."""

from hf_drt.transition.change import Transition, change_forms, empty_forms, warn_of_rounding
from hf_drt.transition.exchange import Change, HalfwayError, Outcome, exchange, exchange_layers
from hf_drt.transition.function_error import FunctionError
from hf_drt.transition.remembered import remembered_layers

__all__ = [
    "Change",
    "FunctionError",
    "HalfwayError",
    "Outcome",
    "Transition",
    "change_forms",
    "empty_forms",
    "exchange",
    "exchange_layers",
    "remembered_layers",
    "warn_of_rounding",
]
