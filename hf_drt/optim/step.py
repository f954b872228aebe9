"""What happens around one optimizer step: LR re-warm-up, LR multipliers per form, Frobenius decay, and the step of the
matrix optimizer.

The scheduled learning rates are scaled just before ``optimizer.step()`` and restored just after it, so that a
scheduler of any kind, and the checkpoint, see only their own numbers.
"""

from collections.abc import Callable
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_drt.forms import FactoredLinear, trainable_weights
from hf_drt.optim.groups import FROBENIUS, LR_SCALE
from hf_drt.optim.matrix_step import MatrixStep
from hf_drt.optim.nested_steps import outermost
from hf_drt.optim.owners import owners, rewarmup_factors
from hf_drt.optim.rates import check_matrix_rates


def rewarmup_factor(steps_since_switch: int | None, steps: int, start: float) -> float:
    """Share of the scheduled LR: linear from ``start`` at the switch to 1 after ``steps`` update steps.

    1 where no switch has been made yet (None), or the re-warm-up is off.
    """
    if steps_since_switch is None or steps_since_switch >= steps:
        return 1.0
    return start + (1 - start) * steps_since_switch / steps


def frobenius_decay_(U: Tensor, V: Tensor, amount: float, amount_V: float | None = None) -> None:
    """In place ``U -= a U (V V^T)`` and ``V -= a (U^T U) V`` with a = lr lambda, which may be another for V: one
    decoupled descent step on ``1/2 ||U V||_F^2``, both gradients taken before either step (Khodak et al. 2021, Eq. 4).
    r x r products only."""
    # The step may stand in the caller's autocast, where products would be of half precision.
    with torch.autocast(U.device.type, enabled=False):
        U_step, V_step = U @ (V @ V.mT), (U.mT @ U) @ V
    U.sub_(U_step, alpha=amount)
    V.sub_(V_step, alpha=amount if amount_V is None else amount_V)


def step_scales(
    optimizer: torch.optim.Optimizer, factors: Callable[[torch.optim.Optimizer], list[float]] = rewarmup_factors
) -> list[float]:
    """What the scheduled rate of each group is multiplied with in the step to come: the re-warm-up's share and the
    form's multiplier."""
    shares = factors(optimizer)
    return [share * group.get(LR_SCALE, 1.0) for share, group in zip(shares, optimizer.param_groups, strict=True)]


class StepRules:
    """The rules above, installed on an optimizer as its step hooks; one set of rules per optimizer, for all its owners.

    ``factors`` gives the re-warm-up's share for every group; the other rules stand in the groups themselves. A closure
    is evaluated after the Frobenius decay, whose gradients' presence is that of the step before.
    """

    _installed: ClassVar["WeakKeyDictionary[torch.optim.Optimizer, StepRules]"] = WeakKeyDictionary()
    # Of a step that has raised it holds gradients, which outlive a set of rules.
    _matrix_steps: ClassVar[WeakKeyDictionary[torch.optim.Optimizer, MatrixStep]] = WeakKeyDictionary()

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factors: Callable[[torch.optim.Optimizer], list[float]] = rewarmup_factors,
    ):
        self.clear(optimizer)
        self._installed[optimizer] = self
        self._factors = factors
        self._scheduled: list = []
        self._looked = False
        self._matrices = self._matrix_steps.setdefault(optimizer, MatrixStep())
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_pre_hook(self._restore),  # where a step has raised
        ]

    @outermost
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        scales = step_scales(optimizer, self._factors)
        self._restore(optimizer)  # where the step before has raised, and left its scaled rates behind
        # The first of the arguments is the optimizer itself.
        self._matrices.before(optimizer, kwargs.get("closure", args[1] if len(args) > 1 else None))
        self._looked = self._looked or check_matrix_rates(optimizer)
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            if scale != 1:  # a rate that nothing scales may be None
                group["lr"] = group["lr"] * scale
        _decay_products(optimizer)

    @outermost
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        self._matrices.after(optimizer)
        self._restore(optimizer)

    def _restore(self, optimizer: torch.optim.Optimizer) -> None:
        for group, lr in zip(optimizer.param_groups, self._scheduled, strict=False):
            group["lr"] = lr
        self._scheduled = []

    @classmethod
    def clear(cls, optimizer: torch.optim.Optimizer) -> None:
        """Take the rules off an optimizer; two sets would scale the rates twice."""
        rules = cls._installed.pop(optimizer, None)
        if rules is None:
            return
        rules._restore(optimizer)
        for handle in rules._handles:
            handle.remove()


@torch.no_grad()
def _decay_products(optimizer: torch.optim.Optimizer) -> None:
    """Of the layers in form groups with Frobenius decay, each factor at its own group's rate."""
    groups = {id(p): group for group in optimizer.param_groups if group.get(FROBENIUS) for p in group["params"]}
    for owner in owners(optimizer) if groups else ():
        for layer in owner.modules():
            if isinstance(layer, FactoredLinear) and id(trainable_weights(layer)[0]) in groups:
                U, V, _ = layer.pair()
                if U.grad is not None:
                    amounts = (float(group["lr"]) * group[FROBENIUS] for group in (groups[id(U)], groups[id(V)]))
                    frobenius_decay_(U, V, *amounts)
