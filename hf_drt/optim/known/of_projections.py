"""Optimizers that project gradients to a low rank, GaLore (Zhao et al. 2024) and APOLLO (Zhu et al. 2024), and what the
Trainer has in their place where they update layer by layer."""

import torch
from torch import nn

from hf_drt.optim.known.of_transformers import RELATIVE_STEP
from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import OptimizerRule, State

_UNSAVED = "a projector for each weight, a Python object that torch.load(weights_only=True) does not read"


def _seed(optimizer: torch.optim.Optimizer, weight: nn.Parameter) -> State:
    """What the constructor gives a weight in its place, from which its random projections are drawn."""
    weights = (p for group in optimizer.param_groups for p in group["params"])
    return {"seed": next(place for place, p in enumerate(weights, 1) if p is weight)}


OPTIMIZERS.add(
    "galore_torch.adamw.AdamW",
    OptimizerRule(
        "GaLore's AdamW, without saving; factors have its projections too, and begin anew",
        tested="galore-torch 1.0",
        optim={"galore_adamw": {}},
        imported="galore_torch.GaLoreAdamW",
        nearest="adamw_torch",
        picks_layers=True,
        unsaved=_UNSAVED,
    ),
)
OPTIMIZERS.add(
    "galore_torch.adafactor.Adafactor",
    OptimizerRule(
        "GaLore's Adafactor, without saving; factors have its projections too, and begin anew",
        tested="galore-torch 1.0",
        optim={"galore_adafactor": {}},
        imported="galore_torch.GaLoreAdafactor",
        picks_layers=True,
        unsaved=_UNSAVED,
        own_rate=RELATIVE_STEP,
        nearest="adafactor",
    ),
)
OPTIMIZERS.add(
    "galore_torch.adamw8bit.AdamW8bit",
    OptimizerRule(
        "GaLore's AdamW in 8 bits",
        tested="galore-torch 1.0",
        optim={"galore_adamw_8bit": {}},
        imported="galore_torch.GaLoreAdamW8bit",
        refused="it makes its state on a CUDA device alone, where it has not been seen to follow, and its checkpoints "
        f"hold {_UNSAVED}.",
        nearest="adamw_8bit",
    ),
)
OPTIMIZERS.add(
    "apollo_torch.apollo.AdamW",
    OptimizerRule(
        "APOLLO's AdamW, without saving; factors have its projections too, and begin anew",
        tested="apollo-torch 1.0.3",
        optim={"apollo_adamw": {}},
        imported="apollo_torch.APOLLOAdamW",
        nearest="adamw_torch",
        new_state=_seed,
        picks_layers=True,
        unsaved=_UNSAVED,
    ),
)
OPTIMIZERS.add(
    "transformers.trainer_pt_utils.LayerWiseDummyOptimizer",
    OptimizerRule(
        "GaLore and APOLLO layer by layer",
        tested="transformers 5.24",
        optim={
            "galore_adamw_layerwise": {},
            "galore_adamw_8bit_layerwise": {},
            "galore_adafactor_layerwise": {},
            "apollo_adamw_layerwise": {},
        },
        refused="each weight has an optimizer of its own in a hook of its gradient, which a new weight would not have, "
        "so that it would never be trained; none of their state is saved.",
        nearest="adamw_torch",
    ),
)
