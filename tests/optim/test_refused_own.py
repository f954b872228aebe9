"""Optimizers without a rule that do not follow a change of form: refused with what a trial has seen, and nothing else
has changed then."""

import random

import numpy as np
import pytest
import tiny
import torch
import toys
from transformers import Trainer

from hf_drt import DRTCallback, DRTConfig, DRTTrainer, DynamicRank, form_of

FAULTS = {
    toys.OwnList: r"it goes on training a parameter that has been replaced in its group\.",
    toys.Acquainted: r"a parameter that had taken another's place in its group did not move in 12 steps\.",
    toys.ByIdentity: r"it raised KeyError: \d+ \(in the steps of a parameter without state\)\.",
    toys.MadeState: r"it raised KeyError: 'average' \(in the steps of a parameter without state\)\.",
    toys.ByIndex: r"it raised RuntimeError: The size of tensor .* \(once a parameter had been replaced after",
    toys.Buffers: r"it keeps a tensor of shape \(64, 32\) in buffers, outside its state, where neither",
    toys.OwnDict: r"it keeps a replaced parameter alive, 12 steps after its group and its state let it go\.",
    toys.InGroup: r"it keeps a replaced parameter alive",
    toys.WeakDict: r"a fresh one that loaded its state_dict went on otherwise than itself, by up to [\d.e-]+ of a",
    toys.GroupSteps: r"first update after 400 steps was 1\.8 times that of a fresh .* \(allowed are 0\.67 to 1\.5\)",
    toys.Coupled: r"parameters that stayed trained otherwise than without the exchange, by up to 0\.0\d of their",
    toys.InBackward: r"it acts in the backward pass, by a hook on its parameters \(update\), which new",
    toys.InBackwardByClosure: r"it acts in the backward pass, by a hook on its parameters \(<lambda>\)",
    toys.OwnBackward: r"it raised NotImplementedError: call fused_backward\(loss, lr\) \(in the steps",
    toys.Closures: r"it raised TypeError: .*missing 1 required positional argument: 'closure' \(in the steps",
    toys.HoldsModel: r"it holds a model \(Linear\) in model, of which a trial makes no copy\.",
    toys.HoldsLock: r"it cannot be copied for a trial: .*TypeError: cannot pickle '_thread\.lock' object\.",
    toys.ObjectInState: r"its state_dict holds toys\.Projector, which torch\.load\(weights_only=True\) refuses",
    toys.Still: r"a parameter that had taken another's place in its group did not move in 12 steps\.",
    toys.SlowWeights: r"it keeps a replaced parameter alive",
}
faulty = pytest.mark.parametrize("cls", FAULTS)


def message(cls) -> str:
    return (
        rf"the optimizer toys\.{cls.__name__} cannot follow a change of form: it has no rule, and in a trial on small "
        rf"parameters .*{FAULTS[cls]}.* Let it keep what it knows of a parameter in self\.state\[parameter\], made at "
        rf"the parameter's first step, or register what it needs: hf_drt\.optim\.OPTIMIZERS\.add\("
        rf"'toys\.{cls.__name__}', OptimizerRule\(\.\.\.\)\)\. Of the \d+ that can, .* So can classes without a rule "
        r"that pass a trial\."
    )


def made(cls, model):
    if cls is toys.SlowWeights:
        return cls(torch.optim.Adam(model.parameters(), lr=0.01))
    return cls(model.parameters())


def bits(model, optimizer):
    """All that a refusal must not change, and the objects that hold it."""
    groups = [(id(g), [id(p) for p in g["params"]], {k: v for k, v in g.items() if k != "params"})
              for g in optimizer.param_groups]  # fmt: skip
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "modules": [id(module) for module in model.modules()],
        "parameters": [(id(p), p.requires_grad, p.grad, p._version) for p in model.parameters()],
        "groups": groups,
        "state": {id(p): str(state) for p, state in optimizer.state.items()},
        "attributes": {key: id(value) for key, value in vars(optimizer).items()},
        "random": (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()),
    }


@faulty
def test_it_is_refused_with_what_was_seen_and_nothing_has_changed(cls):
    model = tiny.llama(num_hidden_layers=1)
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@50%", rank=8), max_steps=4)
    optimizer = made(cls, model)
    before = bits(model, optimizer)
    for refused in (lambda: drt.apply(0, optimizer), lambda: drt.install(optimizer)):
        with pytest.raises(ValueError, match=message(cls)):
            refused()
        assert bits(model, optimizer) == before
    assert drt.phase is None


@pytest.mark.parametrize("cls", [toys.OwnList, toys.GroupSteps, toys.HoldsLock])
def test_a_trainer_refuses_it_before_the_first_step(tmp_path, cls):
    model = tiny.llama(num_hidden_layers=1)
    optimizer = made(cls, model)
    settings = {"max_steps": 4, "drt_schedule": "factored@0 dense@50%", "drt_rank": 8}
    args = tiny.arguments(tmp_path, **settings)
    trainer = DRTTrainer(model=model, args=args, train_dataset=tiny.dataset(), optimizers=(optimizer, None))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    held = [list(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message(cls)):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(p is q for own, other in zip(held, [g["params"] for g in optimizer.param_groups], strict=True)
               for p, q in zip(own, other, strict=True))  # fmt: skip


def test_one_that_the_trainer_makes_is_refused_and_the_model_is_dense_again(tmp_path):
    model = tiny.llama(num_hidden_layers=1)
    args = tiny.arguments(tmp_path, max_steps=4, drt_schedule="factored@0 dense@50%", drt_rank=8)
    given = {"optimizer_cls_and_kwargs": (toys.OwnDict, {"lr": 1e-3})}
    trainer = DRTTrainer(model=model, args=args, train_dataset=tiny.dataset(), **given)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message(toys.OwnDict)):
        trainer.train()
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_callback_of_a_plain_trainer_refuses_it(tmp_path):
    model = tiny.llama(num_hidden_layers=1)
    args = tiny.arguments(tmp_path, max_steps=4, drt_schedule=None)
    callback = DRTCallback(DRTConfig(schedule="factored@0 dense@50%", rank=8))
    optimizers = (toys.OwnList(model.parameters()), None)
    run = Trainer(model=model, args=args, train_dataset=tiny.dataset(), callbacks=[callback], optimizers=optimizers)
    with pytest.raises(ValueError, match=message(toys.OwnList)):
        run.train()
    assert form_of(model.get_submodule("model.layers.0.mlp.up_proj")).__class__.__name__ == "Dense"


SETTINGS = {
    "project": (
        toys.Lion,
        {"moments": "project"},
        r"moments='project' has no effect with the optimizer toys\.Lion: no rule says which of its state \(m\) "
        r"is a moment\. Set moments='reset', .*OPTIMIZERS\.add\('toys\.Lion', OptimizerRule\('what it is', Moment",
    ),
    "project-without-state": (
        toys.Plain,
        {"moments": "project"},
        r"toys\.Plain: in a trial on small parameters it kept no state that could follow\. Set moments='reset'\.$",
    ),
    "group": (
        toys.KeepsGroups,
        {"factored_lr_scale": 2.0},
        r"factored_lr_scale=2\.0: .* in a trial of toys\.KeepsGroups on small parameters it did not train parameters "
        r"that came to such a group\. Leave the setting out",
    ),
    "groups": (
        toys.NoEmptyGroup,
        {"factored_lr_scale": 2.0},
        r"factored_lr_scale=2\.0: this needs parameter groups that are added to the optimizer, but in a trial of "
        r"toys\.NoEmptyGroup on small parameters it raised ValueError: a group without parameters .*the setting out",
    ),
    "first-rate": (
        lambda params: torch.optim.Rprop(params, lr=1e-3),
        {"factored_lr_scale": 2.0},
        r"factored_lr_scale=2\.0: .* in a trial of torch\.optim\.rprop\.Rprop on small parameters lr made no",
    ),
    "rate": (
        toys.FixedRate,
        {"rewarmup_steps": 2},
        r"rewarmup_steps=2: this needs the learning rate of the optimizer's groups, but in a trial of "
        r"toys\.FixedRate on small parameters lr made no difference after the first steps\. Leave the",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_it_cannot_serve_are_refused_and_without_them_it_trains(name):
    cls, settings, match = SETTINGS[name]
    model = tiny.llama(num_hidden_layers=1)
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@50%", rank=8, **settings), max_steps=4)
    optimizer = cls(model.parameters())
    before = bits(model, optimizer)
    for refused in (lambda: drt.apply(0, optimizer), lambda: drt.install(optimizer)):
        with pytest.raises(ValueError, match=match):
            refused()
        assert bits(model, optimizer) == before
    other = DynamicRank(model, DRTConfig(schedule="factored@0 dense@50%", rank=8), max_steps=4)
    for step in range(4):
        other.begin_step(step, optimizer)
        weights = [p.detach().clone() for p in model.parameters()]
        model(**tiny.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not any(map(torch.equal, weights, model.parameters()))
