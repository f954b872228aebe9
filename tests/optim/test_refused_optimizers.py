"""An optimizer whose state nobody knows how to carry over is refused by its name."""

import pytest
import torch
from torch import nn

from hf_drt.optim import rule_of


class OtherAdam(torch.optim.Adam):
    """Third parties' subclasses may keep state that is not known here."""


class AdamW(torch.optim.SGD):
    """Has the name of a supported one, as bitsandbytes' AdamW."""


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (torch.optim.Adagrad, r"torch\.optim\.adagrad\.Adagrad"),
        (torch.optim.Adadelta, r"torch\.optim\.adadelta\.Adadelta"),
        (torch.optim.LBFGS, r"torch\.optim\.lbfgs\.LBFGS"),
        (torch.optim.Adafactor, r"torch\.optim\.Adafactor"),
        (OtherAdam, r"test_refused_optimizers\.OtherAdam"),
        (AdamW, r"test_refused_optimizers\.AdamW"),
    ],
)
def test_an_optimizer_whose_state_is_unknown_is_refused_by_its_full_name(make, name):
    optimizer = make([nn.Parameter(torch.zeros(2, 2))])
    message = (
        rf"the optimizer (\w+\.)*{name} cannot follow a change of form: .*Allowed are torch\.optim\.Adam, "
        r"torch\.optim\.AdamW, torch\.optim\.NAdam, torch\.optim\.RAdam, torch\.optim\.RMSprop, torch\.optim\.SGD, "
        r"transformers\.optimization\.Adafactor \(optim=adamw_torch, adamw_torch_fused, sgd, rmsprop or adafactor\), "
        r"and no classes derived from them or named like them\."
    )
    with pytest.raises(ValueError, match=message):
        rule_of(optimizer)
