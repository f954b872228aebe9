"""One optimizer through every phase: groups, moments, and the rules around a step."""

from hf_drt.optim.carry import carry_groups, carry_moments, put_states, remembered, take_states, unwrap
from hf_drt.optim.groups import add_form_groups, form_group_options, locate
from hf_drt.optim.install import install, staged
from hf_drt.optim.moments import OPTIMIZERS, moment_keys, qualified_name
from hf_drt.optim.outline import stand_ins
from hf_drt.optim.owners import Owner, optimizer_made_in, owners
from hf_drt.optim.rates import check_rate, has_own_rate
from hf_drt.optim.step import StepRules, frobenius_decay_, rewarmup_factor

__all__ = [
    "OPTIMIZERS",
    "Owner",
    "StepRules",
    "add_form_groups",
    "carry_groups",
    "carry_moments",
    "check_rate",
    "form_group_options",
    "frobenius_decay_",
    "has_own_rate",
    "install",
    "locate",
    "moment_keys",
    "optimizer_made_in",
    "owners",
    "put_states",
    "qualified_name",
    "remembered",
    "rewarmup_factor",
    "staged",
    "stand_ins",
    "take_states",
    "unwrap",
]
