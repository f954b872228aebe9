"""A controller that cannot do anything, or not go on, is refused, and the model stays as it was."""

import pytest
import tiny
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank
from hf_drt.targets.surgery import Swap, replace

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "max_steps", "message"),
    [
        (DRTConfig(), 10, r"DynamicRank needs either a plan, or config\.schedule and max_steps"),
        (tiny.config(), None, r"DynamicRank needs either a plan, or config\.schedule and max_steps"),
        (tiny.config(), 0, r"never trains: the run has 0 update steps"),
        (tiny.config(schedule="factored@0 dense@1ep"), 10, r"'@1ep' needs data of known length"),
        (tiny.config(include=["conv"]), 10, r"14 not matched by include"),
        (
            tiny.config(rank_ratio=1.0),
            10,
            rf"phase 'factored@0' leaves all 14 layers dense: their ranks reach break-even, e\.g\. 16 for {Q} of shape "
            r"\(out, in\) = \(32, 32\), .*Lower the rank .*, or rank_multiple for small layers",
        ),
        (tiny.config(rank_multiple=64), 10, r"leaves all 14 layers dense: their ranks reach break-even"),
        (DRTConfig(schedule="dense@0 adapter:500@5"), 10, r"phase 'adapter:500@5' leaves all 14 layers dense"),
    ],
)
def test_a_controller_that_could_not_do_anything_is_refused(config, max_steps, message):
    with pytest.raises(ValueError, match=message):
        DynamicRank(tiny.llama(), config, max_steps)


def start(model: nn.Module, **settings) -> DynamicRank:
    controller = DynamicRank(model, tiny.config(**settings), max_steps=10)
    controller.apply(0)
    return controller


NOT_IN_OPTIMIZER = rf"the weights of {Q} are not in the optimizer\. Make it after the first phase .* use exclude="


@pytest.mark.parametrize("step", [0, 4], ids=["first step", "switch"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: torch.optim.LBFGS(model.parameters()),
            r"the optimizer torch\.optim\.lbfgs\.LBFGS cannot follow a change of form",
        ),
        (lambda model: torch.optim.AdamW(model.lm_head.parameters()), NOT_IN_OPTIMIZER),
        (
            lambda model: torch.optim.AdamW(p for name, p in model.named_parameters() if name != f"{Q}.V"),
            NOT_IN_OPTIMIZER,
        ),
    ],
    ids=["closure", "other weights", "one factor missing"],
)
def test_an_optimizer_that_cannot_follow_is_refused_and_the_model_stays(make, message, step):
    model = tiny.llama()
    # With a multiplier the weights are looked up at once, else at the first switch.
    controller = start(model, factored_lr_scale=2.0)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        controller.begin_step(step, make(model))
    assert {name: id(module) for name, module in model.named_modules()} == before


class Wrapper(nn.Module):
    """What adapter libraries put in the place of a layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer


@pytest.mark.parametrize("step", [4, 7], ids=["to dense", "to adapter"])
@pytest.mark.parametrize(
    "other",
    [nn.Identity(), Wrapper(nn.Linear(32, 32)), nn.Linear(32, 64), nn.Conv1d(32, 32, 1), None],
    ids=["no linear layer", "wrapped", "other shape", "convolution", "deleted"],
)
def test_a_layer_that_somebody_else_has_replaced_is_refused_by_name(other, step):
    model = tiny.llama()
    controller = start(model)
    if step == 7:
        controller.apply(4)
    optimizer = torch.optim.AdamW(model.parameters())
    model.model.layers[0].self_attn.q_proj = other
    with pytest.raises(ValueError, match=rf"{Q}.*(all other changes|replaced)"):
        controller.begin_step(step, optimizer)


def test_replacing_a_layer_that_is_gone_is_refused_and_nothing_is_replaced():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = list(model)
    swaps = [Swap("0", model[0], nn.Identity()), Swap("7", nn.Linear(2, 2), nn.Identity())]
    with pytest.raises(ValueError, match=r"7 is not in the model any more\. Something else has replaced it"):
        replace(model, swaps)
    assert list(model) == before
