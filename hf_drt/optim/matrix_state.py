"""The momentum of the matrix optimizer in an optimizer's state dict.

It is written there as any state is. On loading it goes past the optimizer's own code, which looks for the entries of
its own steps in every parameter's state: torch's Adam fails where there is no ``step``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_drt.optim.matrices import MATRIX


def kept_apart(optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
    """From now on a state dict is loaded without the matrices' state, which is put in after it. The handles end
    that."""
    aside: dict[int, dict[str, Any]] = {}

    def before(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        matrices = {index for group in state_dict["param_groups"] if MATRIX in group for index in group["params"]}
        aside.clear()
        aside.update({index: state for index, state in state_dict["state"].items() if index in matrices})
        return state_dict | {"state": {i: state for i, state in state_dict["state"].items() if i not in matrices}}

    def after(optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, state in aside.items():
            weight = parameters[index]
            optimizer.state[weight] = {key: _copied(value, weight) for key, value in state.items()}
        aside.clear()

    return [
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after),
    ]


def _copied(value: Any, weight: Tensor) -> Any:
    return value.to(device=weight.device, copy=True) if isinstance(value, Tensor) else value
