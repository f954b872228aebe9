"""One optimizer through every phase: groups, moments, and the rules around a step."""

from hf_drt.optim import known  # noqa: F401 (fills the registry)
from hf_drt.optim.averages import at_averages
from hf_drt.optim.by_name import estimated_names, maker, optim_names, refuse_optim, rule_of_name
from hf_drt.optim.carry import carry_groups, carry_moments, put_states, remembered, take_states, unwrap
from hf_drt.optim.groups import GROUP_SETTINGS, add_form_groups, form_group_options, group_settings
from hf_drt.optim.install import install, refuse_sharded, staged
from hf_drt.optim.matrices import MATRIX, STACKED, LayerUpdate, update_layers
from hf_drt.optim.outline import stand_ins
from hf_drt.optim.owners import Owner, optimizer_made_in, owners
from hf_drt.optim.rates import check_rate, check_step, own_rate
from hf_drt.optim.registry import OPTIMIZERS, known_rule, public_name, qualified_name, refuse, rule_of
from hf_drt.optim.rule import MomentKeys, OptimizerRule, OwnRate
from hf_drt.optim.rule_tables import optimizer_rows, refused_rows
from hf_drt.optim.step import StepRules, frobenius_decay_, rewarmup_factor, step_scales

__all__ = [
    "GROUP_SETTINGS",
    "MATRIX",
    "OPTIMIZERS",
    "STACKED",
    "LayerUpdate",
    "MomentKeys",
    "OptimizerRule",
    "OwnRate",
    "Owner",
    "StepRules",
    "add_form_groups",
    "at_averages",
    "carry_groups",
    "carry_moments",
    "check_rate",
    "check_step",
    "estimated_names",
    "form_group_options",
    "frobenius_decay_",
    "group_settings",
    "install",
    "known_rule",
    "maker",
    "optim_names",
    "optimizer_made_in",
    "optimizer_rows",
    "own_rate",
    "owners",
    "public_name",
    "put_states",
    "qualified_name",
    "refuse",
    "refuse_optim",
    "refuse_sharded",
    "refused_rows",
    "remembered",
    "rewarmup_factor",
    "rule_of",
    "rule_of_name",
    "staged",
    "stand_ins",
    "step_scales",
    "take_states",
    "unwrap",
    "update_layers",
]
