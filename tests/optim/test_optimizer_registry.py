"""An optimizer that this package does not know is one registration, and is then known everywhere."""

import pytest
import tiny
import torch
import transformers as T
from torch import nn
from typer.testing import CliRunner

from hf_drt import DRTConfig, DynamicRank
from hf_drt.cli.app import app
from hf_drt.forms import trainable_weights
from hf_drt.optim import (
    OPTIMIZERS,
    MomentKeys,
    OptimizerRule,
    OwnRate,
    maker,
    optim_names,
    optimizer_rows,
    qualified_name,
    refused_rows,
    rule_of,
)
from hf_drt.simulate import optimizer_bytes
from hf_drt.trainer.checkpoint import check_optimizer

LAYER = "model.layers.0.mlp.up_proj"


class Momentum(torch.optim.Optimizer):
    """SGD with momentum, which makes its state where it is constructed; ``scale`` is of another shape."""

    def __init__(self, params, lr=0.1, own=False):
        super().__init__(params, {"lr": lr, "own": own})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = begun(self, p)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                state["average"].mul_(0.9).add_(p.grad)
                state["scale"].copy_(p.grad.flatten()[:3])
                p.sub_(state["average"], alpha=group["lr"])


def begun(optimizer, weight):
    return {"average": torch.zeros_like(weight), "scale": weight.new_zeros(3)}


NAME = f"{__name__}.Momentum"
RULE = OptimizerRule(
    "a toy with momentum",
    MomentKeys(first=("average",)),
    optim={"toy_momentum": {"lr": 0.5}},
    new_state=begun,
    state_shape=lambda key, shape: (3,) if key == "scale" else shape,
    own_rate=OwnRate(lambda group: group["own"], "own=True", "own=False"),
)


@pytest.fixture
def toy():
    OPTIMIZERS.add(NAME, RULE)
    yield RULE
    OPTIMIZERS.remove(NAME)


def trained(model, optimizer, steps=1):
    for seed in range(steps):
        torch.manual_seed(seed)
        model(**tiny.batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def switched(**settings):
    """A model that has gone from dense to factors under the toy, its controller and the momentum of W just before."""
    torch.manual_seed(0)
    model = tiny.llama(hidden_size=64, intermediate_size=96)
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored@50%", rank=8, **settings), max_steps=4)
    drt.apply(0)
    optimizer = Momentum(model.parameters())
    drt.install(optimizer)
    trained(model, optimizer, 2)
    average = optimizer.state[model.get_submodule(LAYER).weight]["average"].clone()
    drt.begin_step(2, optimizer)
    return model, optimizer, average


def test_without_its_registration_it_is_refused():
    with pytest.raises(ValueError, match=r"test_optimizer_registry\.Momentum cannot follow .* KeyError: 'average'"):
        rule_of(Momentum([nn.Parameter(torch.zeros(2))]))


def test_its_momentum_follows_a_switch_by_the_chain_rule(toy):
    model, optimizer, M = switched(moments="project")
    layer = model.get_submodule(LAYER)
    (layer.weight * M).sum().backward()  # d<W, M>/dU = M V^T, which is what its momentum has to be
    for weight in trainable_weights(layer):
        torch.testing.assert_close(optimizer.state[weight]["average"], weight.grad)
    model.zero_grad()
    trained(model, optimizer, 2)


@pytest.mark.parametrize("moments", ["project", "reset"])
def test_new_weights_have_the_state_that_its_constructor_makes(toy, moments):
    model, optimizer, _ = switched(moments=moments)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert set(optimizer.state) == held == set(model.parameters())
    for weight in held:
        assert optimizer.state[weight]["scale"].shape == (3,)
        assert optimizer.state[weight]["average"].shape == weight.shape
    before = {p: p.detach().clone() for p in held}
    trained(model, optimizer)
    assert not any(torch.equal(p, value) for p, value in before.items())


def test_a_checkpoint_of_it_is_looked_at_by_the_shapes_of_its_rule(toy, tmp_path):
    _, optimizer, _ = switched()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    check_optimizer(tmp_path, optimizer)
    state = optimizer.state_dict()
    state["state"][0]["average"] = torch.zeros(5)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(ValueError, match="holds average of shape"):
        check_optimizer(tmp_path, optimizer)


def test_rules_on_its_rate_are_refused_where_it_has_its_own(toy):
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@50%", rank=4, rewarmup_steps=2), max_steps=4)
    drt.apply(0)
    message = r"rewarmup_steps=2: .* Momentum with own=True computes its own .* Use Momentum\(params, own=False\)"
    with pytest.raises(ValueError, match=message):
        drt.install(Momentum(model.parameters(), own=True))


def test_errors_and_tables_name_it(toy):
    class Momentum(torch.optim.SGD):
        """Near it by name, and no optimizer that could be tried."""

        def step(self, closure):
            return super().step(closure)

    with pytest.raises(ValueError, match=r"Of the \d+ that can, .*test_optimizer_registry\.Momentum.* nearest by name"):
        rule_of(Momentum([nn.Parameter(torch.zeros(2))]))
    assert (NAME, "toy_momentum", "a toy with momentum", "first moments", "", "") in optimizer_rows()
    with pytest.raises(ValueError, match=r"'momentum' is not an optimizer of known state\. .*toy_momentum"):
        optimizer_bytes("momentum", [])


def test_its_bytes_are_those_of_a_real_step(toy):
    parameters = [nn.Parameter(torch.ones(shape)) for shape in ((40, 30), (40, 30), (7,))]
    optimizer = Momentum(parameters)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    real = sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values())
    state, scratch = optimizer_bytes("toy_momentum", parameters)
    assert state == real == 4 * (2 * 1200 + 7 + 3 * 3)
    assert scratch == 0  # all of it is in place


def test_the_command_line_takes_and_names_it(toy, tmp_path):
    tiny.llama(hidden_size=64, intermediate_size=96).config.save_pretrained(tmp_path)
    plan = [
        "plan",
        str(tmp_path),
        "--schedule",
        "factored@0 dense@50%",
        "--rank",
        "8",
        "--seq-length",
        "8",
        "--task",
        "causal-lm",
    ]
    taken = CliRunner().invoke(app, [*plan, "--optimizer", "toy_momentum"])
    assert taken.exit_code == 0, taken.output
    assert "toy_momentum" in taken.output
    refused = CliRunner().invoke(app, [*plan, "--optimizer", "momentum"])
    assert refused.exit_code == 2
    assert "toy_momentum" in refused.output


def test_an_optimizer_may_be_known_and_refused_with_its_reason(toy):
    OPTIMIZERS.remove(NAME)
    OPTIMIZERS.add(NAME, OptimizerRule("a toy", optim={"toy": {}}, refused="it keeps W. Take another toy."))
    with pytest.raises(ValueError, match=r"Momentum cannot follow a change of form: it keeps W\. Take another toy\."):
        rule_of(Momentum([nn.Parameter(torch.zeros(2))]))
    assert "toy" not in optim_names()
    assert (NAME, "toy", "it keeps W. Take another toy.", "") in refused_rows()
    with pytest.raises(ValueError, match=r"optim='toy' cannot follow a change of form: it keeps W\. Take ano"):
        maker("toy")
    assert NAME not in {row[0] for row in optimizer_rows()}


@pytest.mark.parametrize("name", optim_names())
def test_the_trainer_makes_what_the_registry_says(name, tmp_path):
    args = T.TrainingArguments(output_dir=tmp_path, optim=name, use_cpu=True, report_to=[])
    if OPTIMIZERS[optim_names()[name]].picks_layers:
        args.optim_target_modules = ["mlp"]
    kind, settings = T.Trainer.get_optimizer_cls_and_kwargs(args, tiny.llama())
    assert qualified_name(kind) == optim_names()[name]
    own = OPTIMIZERS[qualified_name(kind)].optim[name]
    assert {key: settings[key] for key in own if key != "lr"} == {key: own[key] for key in own if key != "lr"}


@pytest.mark.parametrize("names", ["momentum", ["momentum"], (1,)])
def test_moments_that_are_not_named_by_a_tuple_of_texts_are_refused(names):
    with pytest.raises(TypeError, match=r"moments are named by a tuple of texts, as in first=\('momentum',\), got"):
        MomentKeys(first=names)


def test_a_name_whose_package_is_not_installed_says_what_to_install():
    OPTIMIZERS.add("nowhere.of.Momentum", OptimizerRule("a toy", optim={"toy": {}}))
    try:
        with pytest.raises(ValueError, match=r"optim='toy' is nowhere\.of\.Momentum, but nowhere is not installed"):
            maker("toy")
    finally:
        OPTIMIZERS.remove("nowhere.of.Momentum")


def test_a_class_of_several_with_one_rule_stands_in_one_row():
    rows = [row for row in optimizer_rows() if row[0].startswith("bitsandbytes.optim.Lion")]
    assert [row[0] for row in rows] == [
        "bitsandbytes.optim.Lion, Lion8bit, Lion32bit, PagedLion, PagedLion8bit, PagedLion32bit"
    ]
    assert rows[0][3:] == ("first moments", "state in 8 bits", "bitsandbytes 0.50.2")
