"""Optimizers that nobody has registered: a trial on a copy shows that they follow a change of form, and they do."""

import copy
import random

import numpy as np
import pytest
import tiny
import torch
import toys
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from hf_drt import DRTCallback, DRTConfig, DRTTrainer, DynamicRank, form_of
from hf_drt.forms import trainable_weights
from hf_drt.optim import OPTIMIZERS, MomentKeys, OptimizerRule, qualified_name, rule_of, unwrap
from hf_drt.trainer.checkpoint import check_optimizer

LAYER = "model.layers.0.mlp.up_proj"
STEPS, SAVED = 9, (2, 4, 7)  # a checkpoint in each form
OWN = {
    "soap": lambda params: toys.Soap(params, lr=3e-3),
    "lion": lambda params: toys.Lion(params, lr=1e-3),
    "own-adam": lambda params: toys.OwnAdam(params, lr=1e-3, amsgrad=True),
    "stochastic": lambda params: toys.Stochastic(params, lr=1e-3),
    "adadelta": lambda params: torch.optim.Adadelta(params, lr=1.0),
    "adamax": lambda params: torch.optim.Adamax(params, lr=1e-3),
    "asgd": lambda params: torch.optim.ASGD(params, lr=1e-2, t0=2),
    "rprop": lambda params: torch.optim.Rprop(params, lr=1e-3),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=1e-2),
    "torch-adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}
RULES = {"drt_factored_lr_scale": 2.0, "drt_adapter_lr_scale": 0.5, "drt_rewarmup_steps": 2}
own = pytest.mark.parametrize("name", OWN)


@pytest.fixture(autouse=True)
def without_rules():
    """Classes that have a rule are tried as if they had none. The rules' order is that of the documentation's table."""
    before = dict(OPTIMIZERS)
    for make in OWN.values():
        name = qualified_name(type(make([nn.Parameter(torch.zeros(2, 2))])))
        if name in OPTIMIZERS:
            OPTIMIZERS.remove(name)
    yield
    for name in list(OPTIMIZERS):
        OPTIMIZERS.remove(name)
    for name, rule in before.items():
        OPTIMIZERS.add(name, rule)


def trainer(folder, make, **changes) -> DRTTrainer:
    """A trainer that is given its optimizer, which is made over the dense model."""
    model = tiny.llama(attention_dropout=0.1, num_hidden_layers=1)
    settings = {
        "max_steps": STEPS, "drt_schedule": "factored@0 dense@3 adapter@6", "drt_rank": 8, "drt_export": "native",
        **changes,
    }  # fmt: skip
    data = tiny.dataset()
    args = tiny.arguments(folder, **settings)
    return DRTTrainer(model=model, args=args, train_dataset=data, optimizers=(make(model.parameters()), None))


def plain(value):
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value.tolist() if torch.is_tensor(value) else value


@pytest.mark.sampled(3)
@own
def test_it_trains_through_three_forms_and_resumes_bitwise(tmp_path, name):
    rules = RULES if name != "rprop" else {}  # which has rates of its own after its first step
    straight = trainer(tmp_path / "straight", OWN[name], save_strategy="steps", save_steps=1, **rules)
    straight.train()
    forms = [row["drt_phase"] for row in straight.state.log_history if "drt_switch_seconds" in row]
    assert forms == [0, 1, 2]
    assert all(value.isfinite().all() for value in straight.model.state_dict().values())
    for step in SAVED:
        resumed = trainer(tmp_path / "resumed", OWN[name], **rules)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        weights, expected = resumed.model.state_dict(), straight.model.state_dict()
        assert weights.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(weights[key], expected[key])] == []
        assert plain(resumed.optimizer.state_dict()) == plain(straight.optimizer.state_dict())


@own
def test_every_weight_of_every_form_is_trained_by_it(name):
    model, make = tiny.llama(num_hidden_layers=1), OWN[name]
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored@1% adapter@50%", rank=8), max_steps=100)
    optimizer = make(model.parameters())
    for step in (0, 1, 50):
        drt.apply(step, optimizer)
        before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
        assert {p for group in optimizer.param_groups for p in group["params"]} == before.keys()
        assert set(optimizer.state) <= before.keys()
        for _ in range(3):  # Soap's first is no update, and lora_A's first gradient is zero
            model(**tiny.batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not any(torch.equal(p, value) for p, value in before.items())


def randoms():
    return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


def test_the_trial_leaves_optimizer_parameters_and_random_states_alone():
    params = [nn.Parameter(torch.randn(30, 20)), nn.Parameter(torch.randn(30))]
    optimizer = toys.OwnAdam(params, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # a rate of 0, and a step() of its own
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    scheduler.step()
    before, attributes = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in params])), dict(vars(optimizer))
    hooks, drawn, steps = dict(optimizer._optimizer_step_post_hooks), randoms(), list(seen)
    rule_of(optimizer)
    assert plain((optimizer.state_dict(), [p.detach() for p in params])) == plain(before)
    assert vars(optimizer) == attributes
    assert optimizer._optimizer_step_post_hooks == hooks
    assert (seen, randoms(), optimizer.made) == (steps, drawn, 1)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in params)
    assert all(p._backward_hooks is None for p in params)


class Monitor:
    """Looks at gradients, and knows the optimizer."""

    def __init__(self, optimizer):
        self.optimizer, self.norms = optimizer, []
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.register_hook(self.see)
                p.register_post_accumulate_grad_hook(lambda p: self.norms.append(p.grad.norm()))

    def see(self, gradient):
        self.norms.append(gradient.norm())


def test_hooks_of_others_on_its_parameters_are_no_reason_to_refuse_it():
    optimizer = toys.Lion([nn.Parameter(torch.ones(4, 4))])
    monitor = Monitor(optimizer)
    rule_of(optimizer)
    assert monitor.norms == []


class Functions(toys.Lion):
    """Has a function in an attribute that its class gives no function to, and a constant outside its state."""

    scale = None

    def __init__(self, params):
        super().__init__(params)
        self.scale, self.weights = torch.square, torch.tensor([0.5, 0.25])

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(self.scale(p.grad) * self.weights.sum(), alpha=self.param_groups[0]["lr"])


def test_functions_and_constants_in_its_attributes_are_its_own():
    rule_of(Functions([nn.Parameter(torch.ones(8, 4))]))


def test_a_copy_in_the_middle_of_a_run_goes_on_to_the_same_bits():
    model = tiny.llama(num_hidden_layers=1)
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@2 adapter@5", rank=8), max_steps=8)
    optimizer = toys.Soap(model.parameters())

    def go(model, drt, optimizer, steps):
        for step in steps:
            drt.begin_step(step, optimizer)
            model(**tiny.batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    go(model, drt, optimizer, range(4))
    other, optimizers = copy.deepcopy((drt, optimizer))
    go(model, drt, optimizer, range(4, 8))
    go(other.model, other, optimizers, range(4, 8))
    weights = other.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = (t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_the_trial_copies_no_memory_of_the_model_or_of_the_state():
    params = [nn.Parameter(torch.randn(400, 300)), nn.Parameter(torch.randn(300, 500))]
    optimizer = toys.Lion(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with Largest() as largest:
        rule_of(optimizer)
    assert 0 < largest.elements <= 36


class Counted(toys.Lion):
    steps = 0

    def step(self, closure=None):
        Counted.steps += 1
        return super().step(closure)


def test_the_trial_is_made_once_and_not_at_a_switch():
    model = tiny.llama(num_hidden_layers=1)
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored@20% adapter@60%", rank=8), max_steps=10)
    optimizer = Counted(model.parameters())
    drt.begin_step(0, optimizer)
    tried = Counted.steps
    assert tried > 0
    for step in range(1, 10):
        drt.begin_step(step, optimizer)
    drt.to_dense(optimizer)
    assert Counted.steps == tried


def test_an_optimizer_that_has_trained_already_is_tried_as_well():
    model = tiny.llama(num_hidden_layers=1)
    optimizer = toys.GroupSteps(model.parameters())
    optimizer.param_groups[0]["k"] = 5_000
    with pytest.raises(ValueError, match=r"first update after 400 steps was 3\.[12] times that of a fresh optimizer"):
        rule_of(optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in OWN if name != "soap"])  # torch has no eigh of 16 bits
def test_parameters_of_16_bits_do_not_hide_what_it_does(name, dtype):
    rule_of(OWN[name]([nn.Parameter(torch.ones(8, 4, dtype=dtype)) for _ in range(2)]))


def test_groups_of_every_kind_are_tried():
    shapes = [[(8, 3, 3, 3), (5,)], [(4, 6, 5)], [()], []]
    groups = [{"params": [nn.Parameter(torch.ones(shape)) for shape in own]} for own in shapes]
    rule_of(toys.Lion(groups))


def test_groups_with_names_get_form_groups_too():
    model = tiny.llama(num_hidden_layers=1)
    config = DRTConfig(schedule="factored@0 dense@50%", rank=8, factored_lr_scale=2.0)
    drt = DynamicRank(model, config, max_steps=4)
    optimizer = toys.Lion(list(model.named_parameters()))
    drt.apply(0, optimizer)
    drt.install(optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [5, 14]


def test_beside_the_matrix_optimizer_its_momentum_is_projected_and_the_rest_is_the_class_s_own(tmp_path):
    changes = {"drt_matrix_optimizer": "muon", "drt_moments": "project"}
    straight = trainer(tmp_path / "straight", OWN["lion"], save_strategy="steps", save_steps=1, **changes)
    straight.train()
    for step in SAVED:
        resumed = trainer(tmp_path / "resumed", OWN["lion"], **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        weights = resumed.model.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in straight.model.state_dict().items())
    states = list(unwrap(straight.optimizer).state.values())
    assert {frozenset(state) for state in states} == {frozenset({"m"}), frozenset({"drt_momentum", "step"})}


def test_a_plain_trainer_with_the_callback_takes_it(tmp_path):
    model = tiny.llama(num_hidden_layers=1)
    args = tiny.arguments(tmp_path, max_steps=6, drt_schedule=None)
    callback = DRTCallback(DRTConfig(schedule="factored@0 dense@3", rank=8))
    optimizers = (toys.Soap(model.parameters()), None)
    run = Trainer(model=model, args=args, train_dataset=tiny.dataset(), callbacks=[callback], optimizers=optimizers)
    run.train()
    assert form_of(model.get_submodule(LAYER)).__class__.__name__ == "Dense"
    held = {p for group in unwrap(run.optimizer).param_groups for p in group["params"]}
    assert set(model.parameters()) == held == set(unwrap(run.optimizer).state)


def test_a_checkpoint_is_compared_where_the_trial_has_shown_the_shapes(tmp_path):
    model = tiny.llama(num_hidden_layers=1)
    optimizer = toys.Soap(model.parameters())
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@50%", rank=8), max_steps=4)
    drt.apply(0, optimizer)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    state = optimizer.state_dict()
    torch.save(state, tmp_path / "optimizer.pt")
    check_optimizer(tmp_path, optimizer)
    state["state"][0]["m"] = torch.zeros(5)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="holds m of shape"):
        check_optimizer(tmp_path, optimizer)


def test_with_a_rule_its_moments_follow():
    name = qualified_name(toys.Lion)
    OPTIMIZERS.add(name, OptimizerRule("Lion", MomentKeys(first=("m",))))
    try:
        model = tiny.llama(num_hidden_layers=1)
        config = DRTConfig(schedule="dense@0 factored@50%", rank=8, moments="project")
        drt = DynamicRank(model, config, max_steps=4)
        optimizer = toys.Lion(model.parameters())
        drt.apply(0, optimizer)
        model(**tiny.batch()).loss.backward()
        optimizer.step()
        model.zero_grad()
        M = optimizer.state[model.get_submodule(LAYER).weight]["m"].clone()
        drt.apply(2, optimizer)
        layer = model.get_submodule(LAYER)
        (layer.weight * M).sum().backward()
        for weight in trainable_weights(layer):
            torch.testing.assert_close(optimizer.state[weight]["m"], weight.grad)
    finally:
        OPTIMIZERS.remove(name)
