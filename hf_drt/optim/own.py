"""Settings that a class without a rule cannot serve, as its trial has shown."""

import torch

from hf_drt.config import DRTConfig
from hf_drt.optim.groups import form_group_options, group_settings
from hf_drt.optim.rates import scaling
from hf_drt.optim.registry import known_rule, qualified_name
from hf_drt.optim.trial import tried


def check_own(optimizer: torch.optim.Optimizer, config: DRTConfig) -> None:
    """Whether an optimizer without a rule, which :func:`hf_drt.optim.rule_of` has let pass, can serve the settings.

    Raises:
        ValueError: It cannot.
    """
    if known_rule(type(optimizer)) is not None:
        return
    name, found = qualified_name(type(optimizer)), tried(optimizer)
    if config.moments == "project" and not config.uses_matrix_optimizer:
        raise ValueError(
            f"moments='project' has no effect with the optimizer {name}: {_without_moments(name, found.kept)}"
        )
    if form_group_options(config) and found.apart:
        raise ValueError(
            f"{group_settings(config)}: this needs parameter groups that are added to the optimizer, but in a trial of "
            f"{name} on small parameters {found.apart} {config.leave_out}.{config.without_matrix_optimizer}"
        )
    if config.uses_matrix_optimizer and found.bare:
        raise ValueError(
            f"matrix_optimizer={config.matrix_optimizer} takes the gradients of its weights aside while the optimizer "
            f"makes its own step, but in a trial of {name} on small parameters {found.bare} Let it pass over "
            f"parameters whose grad is None, or set matrix_optimizer to 'none'.{config.without_matrix_optimizer}"
        )
    if (scales := scaling(config)) and not found.reads_rate:
        raise ValueError(
            f"{scales}: this needs the learning rate of the optimizer's groups, but in a trial of {name} on small "
            f"parameters lr made no difference after the first steps. {config.leave_out}."
            f"{config.without_matrix_optimizer}"
        )


def _without_moments(name: str, kept: tuple[str, ...]) -> str:
    if not kept:
        return "in a trial on small parameters it kept no state that could follow. Set moments='reset'."
    return (
        f"no rule says which of its state ({', '.join(kept)}) is a moment. Set moments='reset', by which the state of "
        f"new weights begins anew; or register them: hf_drt.optim.OPTIMIZERS.add('{name}', OptimizerRule('what it "
        "is', MomentKeys(first=(...), second=(...))))."
    )
