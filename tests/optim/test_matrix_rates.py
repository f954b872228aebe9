"""The matrices' rate is matrix_lr, whatever gives the others theirs; where it cannot be, that is said."""

import pytest
import tiny
import torch
from torch.optim import lr_scheduler

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import trainable_weights

STEPS = 4


def started(groups=None, matrix_lr=0.02, lr=1e-3, **settings):
    """A model, its optimizer and controller under the matrix optimizer, before the first step."""
    torch.manual_seed(0)
    model = tiny.llama(hidden_size=64, intermediate_size=96)
    config = DRTConfig(schedule="factored@0", rank=8, matrix_optimizer="muon", matrix_lr=matrix_lr, **settings)
    drt = DynamicRank(model, config, max_steps=STEPS)
    drt.apply(0)
    optimizer = torch.optim.AdamW(groups(model) if groups else model.parameters(), lr=lr, weight_decay=0.0)
    drt.install(optimizer)
    return model, optimizer, drt


def stepped(model, optimizer, step=0):
    torch.manual_seed(step)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def of_layer(model, optimizer, layer):
    weight = trainable_weights(model.get_submodule(f"model.layers.{layer}.mlp.up_proj"))[0]
    return next(group for group in optimizer.param_groups if any(p is weight for p in group["params"]))


def by_layer(*rates):
    """Makes a group for each of the two blocks at a rate, and one for the rest."""

    def groups(model):
        blocks = [list(block.parameters()) for block in model.model.layers]
        inside = {id(p) for block in blocks for p in block}
        rest = [p for p in model.parameters() if id(p) not in inside]
        return [*({"params": p, "lr": rate} for p, rate in zip(blocks, rates, strict=True)), {"params": rest}]

    return groups


def test_rates_that_differ_by_layer_do_so_for_the_matrices():
    model, optimizer, _ = started(by_layer(1e-3, 4e-3))
    assert [of_layer(model, optimizer, layer)["lr"] for layer in (0, 1)] == [0.02 * 0.25, 0.02]
    stepped(model, optimizer)


def test_a_group_whose_rate_is_0_stays_as_it_is():
    model, optimizer, _ = started(by_layer(0.0, 1e-3))
    before = [p.detach().clone() for p in model.model.layers[0].parameters()]
    moving = model.model.layers[1].mlp.up_proj.U.detach().clone()
    stepped(model, optimizer)
    assert all(map(torch.equal, model.model.layers[0].parameters(), before))
    assert not torch.equal(model.model.layers[1].mlp.up_proj.U, moving)


def test_rates_that_are_all_0_are_no_proportion():
    model, optimizer, _ = started(lr=0.0)
    assert of_layer(model, optimizer, 0)["lr"] == 0.02
    stepped(model, optimizer)


def nano(optimizer):
    """A loop that sets the rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = 3e-3


SETTING = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=3e-3, total_steps=STEPS),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=1e-4, max_lr=1e-3, cycle_momentum=False),
    "loop": nano,
}


@pytest.mark.parametrize("make", SETTING.values(), ids=SETTING)
def test_one_rate_for_all_groups_is_refused_before_anything_moves(make):
    model, optimizer, _ = started()
    make(optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"matrix_lr=0\.02 has no effect: all parameter groups .* set matrix_lr to"):
        stepped(model, optimizer)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize(
    "make",
    [
        lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 3),
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=1e-5),
        lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=1e-3),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=[3e-3, 0.02, 0.02, 0.02], total_steps=STEPS),
    ],
    ids=["lambda", "cosine", "plateau", "one cycle by group"],
)
def test_schedulers_that_tell_the_groups_apart_are_taken(make):
    model, optimizer, _ = started()
    scheduler = make(optimizer)
    for step in range(STEPS):
        stepped(model, optimizer, step)
        scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))


def test_one_rate_for_all_that_is_matrix_lr_is_right():
    model, optimizer, _ = started(matrix_lr=3e-3)
    nano(optimizer)
    stepped(model, optimizer)


def test_a_loop_that_never_passes_the_optimizer_is_told():
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="dense@0", matrix_optimizer="muon"), max_steps=STEPS)
    drt.apply(0)
    with pytest.raises(
        ValueError, match=r"begin_step\(0\) got no optimizer, so that matrix_optimizer=muon would have no"
    ):
        drt.begin_step(0)


class Greedy(torch.optim.Optimizer):
    """Takes every parameter to have a gradient."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


def test_an_own_class_that_needs_all_gradients_is_refused():
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule="dense@0", matrix_optimizer="muon"), max_steps=STEPS)
    drt.apply(0)
    message = r"matrix_optimizer=muon takes the gradients .* it raised TypeError: .* Let it pass over parameters whose"
    with pytest.raises(ValueError, match=message):
        drt.install(Greedy(model.parameters()))


def test_layers_that_another_optimizer_was_made_for_are_not_taken_from_it(tmp_path):
    with pytest.raises(ValueError, match=r"matrix_optimizer=muon and .*galore_adamw.* are for the same weights"):
        tiny.trainer(
            tmp_path, drt_schedule="factored@0", drt_matrix_optimizer="muon", optim="galore_adamw",
            optim_target_modules=["mlp"], save_strategy="no",
        )  # fmt: skip
