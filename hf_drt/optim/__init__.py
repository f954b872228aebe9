"""One optimizer through every phase: groups, moments, and the rules around a step."""

from hf_drt.optim.carry import carry_groups, carry_moments, put_states, remembered, take_states, unwrap
from hf_drt.optim.groups import add_form_groups, form_group_options, locate
from hf_drt.optim.moments import OPTIMIZERS, moment_keys
from hf_drt.optim.step import StepRules, frobenius_decay_, rewarmup_factor

__all__ = [
    "OPTIMIZERS",
    "StepRules",
    "add_form_groups",
    "carry_groups",
    "carry_moments",
    "form_group_options",
    "frobenius_decay_",
    "locate",
    "moment_keys",
    "put_states",
    "remembered",
    "rewarmup_factor",
    "take_states",
    "unwrap",
]
