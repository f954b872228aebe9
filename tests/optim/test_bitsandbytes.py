"""bitsandbytes: what is kept in 32 bits follows a switch, codes begin anew, and its managers learn of new weights."""

import copy

import bitsandbytes
import pytest
import tiny
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank
from hf_drt.checkpoint import CheckpointError
from hf_drt.forms import Factored, convert, trainable_weights
from hf_drt.optim import remembered, rule_of
from hf_drt.optim.moments import project
from hf_drt.trainer.checkpoint import check_optimizer

bnb = bitsandbytes.optim
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture
def manager():
    """The process's own, with nothing of this test left in it."""
    manager = bnb.GlobalOptimManager.get_instance()
    kept = {name: copy.copy(value) for name, value in vars(manager).items()}
    yield manager
    vars(manager).update(kept)


def step(model, optimizer, seed=0):
    torch.manual_seed(seed)
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def llama():
    return tiny.llama(hidden_size=128, intermediate_size=128, num_hidden_layers=1)


def switched(make, before=lambda model, optimizer: None, **settings):
    """A model that has gone from dense to factors; ``before`` is called just before."""
    model = llama()
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored@50%", rank=32, **settings), max_steps=4)
    drt.apply(0)
    optimizer = make(model)
    drt.install(optimizer)
    for seed in range(2):
        step(model, optimizer, seed)
    before(model, optimizer)
    drt.begin_step(2, optimizer)
    return model, optimizer


def bits(optimizer, weight):
    return 8 if optimizer.state[weight]["state1"].dtype == torch.uint8 else 32


# ---- moments


@pytest.mark.parametrize(
    ("make", "first"),
    [
        (lambda weights: bnb.AdamW(weights, lr=1e-3), True),
        (lambda weights: bnb.PagedAdam32bit(weights, lr=1e-3), True),
        (lambda weights: bnb.Lion(weights, lr=1e-3), True),
        (lambda weights: bnb.SGD(weights, lr=1e-3, momentum=0.9), True),
        (lambda weights: bnb.RMSprop(weights, lr=1e-3), False),
    ],
    ids=["adamw", "paged_adam", "lion", "sgd", "rmsprop"],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_in_32_bits_moments_follow_by_the_chain_rule(make, first):
    kept = {}
    model, optimizer = switched(
        lambda model: make(model.parameters()),
        lambda model, o: kept.update(copy.deepcopy(o.state[model.get_submodule(LAYER).weight])),
        moments="project",
    )
    layer = model.get_submodule(LAYER)
    L, R = layer.U.detach(), layer.V.detach()
    M = kept["state1"]
    images = (M @ R.mT, L.mT @ M) if first else (M @ R.square().mT, L.square().mT @ M)
    for weight, image in zip((layer.U, layer.V), images, strict=True):
        torch.testing.assert_close(optimizer.state[weight]["state1"], image)
        assert optimizer.state[weight]["step"] == 2
    step(model, optimizer, 2)


@pytest.mark.parametrize("name", ["AdEMAMix32bit", "PagedAdEMAMix32bit"])
def test_a_class_whose_own_step_fails_is_refused(name):
    optimizer = getattr(bnb, name)([nn.Parameter(torch.zeros(4, 4))])
    with pytest.raises(ValueError, match=r"it has room for one of its two averages, .* Use AdEMAMix\(optim_bits=32\)"):
        rule_of(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 4)
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_a_fast_and_a_slow_average_follow_each_by_itself():
    torch.manual_seed(0)
    old = nn.Linear(24, 16)
    new = convert(copy.deepcopy(old), Factored(6)).module
    averages = torch.randn(2, 16, 24)
    state = {"step": 5, "state1": averages, "state2": averages.square().sum(0)}
    images = project(old, new, [state], rule_of(bnb.AdEMAMix([old.weight])).moments)
    for index, M in enumerate(averages):
        new.zero_grad()
        (new.weight * M).sum().backward()
        for weight, image in zip(trainable_weights(new), images, strict=True):
            torch.testing.assert_close(image["state1"][index], weight.grad)
            assert image["state2"].shape == weight.shape
            assert (image["state2"] >= image["state1"].square()).all()
            assert image["step"] == 5
    back = project(new, old, images, rule_of(bnb.AdEMAMix([old.weight])).moments)[0]
    assert back["state1"].shape == averages.shape


@pytest.mark.parametrize("name", ["AdamW", "Lion", "AdEMAMix"])
def test_codes_of_8_bits_begin_anew(name):
    model, optimizer = switched(
        lambda model: getattr(bnb, name)(model.parameters(), lr=1e-3, optim_bits=8), moments="project"
    )
    weights = trainable_weights(model.get_submodule(LAYER))
    assert not any(weight in optimizer.state for weight in weights)
    step(model, optimizer, 2)
    assert all(optimizer.state[weight]["step"] == 1 and bits(optimizer, weight) == 8 for weight in weights)


# ---- managers


def test_settings_of_single_weights_go_to_those_that_take_their_place(manager):
    def make(model):
        manager.override_config(model.get_submodule(LAYER).weight, "optim_bits", 32)
        manager.register_module_override(model.model.embed_tokens, "weight", {"optim_bits": 32})
        return bnb.AdamW(model.parameters(), lr=1e-3, optim_bits=8)

    known = set(manager.pid2config)
    model, optimizer = switched(make)
    step(model, optimizer, 2)
    in_32 = {name for name, p in model.named_parameters() if p.numel() >= 4096 and bits(optimizer, p) == 32}
    assert in_32 == {"model.embed_tokens.weight", f"{LAYER}.U", f"{LAYER}.V"}
    held = {id(p) for p in model.parameters()}
    assert set(manager.pid2config) - known <= held  # no setting waits for whatever gets an old weight's identity


def test_a_place_in_the_groups_is_not_taken_for_the_weight_that_stood_there(manager):
    """An embedding behind layers, whose places factors push back."""
    model = tiny.llama(hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    manager.register_module_override(model.model.embed_tokens, "weight", {"optim_bits": 32})
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored@50%", rank=32), max_steps=4)
    drt.apply(0)
    embedding = model.model.embed_tokens.weight
    optimizer = bnb.AdamW([*(p for p in model.parameters() if p is not embedding), embedding], lr=1e-3, optim_bits=8)
    drt.install(optimizer)
    step(model, optimizer)
    place = (0, next(i for i, p in enumerate(optimizer.param_groups[0]["params"]) if p is embedding))
    assert place in manager.index2config
    drt.begin_step(2, optimizer)
    step(model, optimizer, 1)
    assert optimizer.param_groups[0]["params"][place[1]] is not embedding
    assert bits(optimizer, embedding) == 32
    assert all(bits(optimizer, p) == 8 for p in model.parameters() if p.numel() >= 4096 and p is not embedding)


def test_paged_state_of_old_weights_is_let_go(manager):
    """On a CPU no state is paged: these stand in the list of pages as a GPU's would."""
    pages = bitsandbytes.functional.GlobalPageManager.get_instance().paged_tensors
    count, other = len(pages), torch.zeros(3)

    def page(model, optimizer):
        state = optimizer.state[model.get_submodule(LAYER).weight]
        pages.extend([state["state1"], other, state["state2"]])

    switched(lambda model: bnb.AdamW(model.parameters(), lr=1e-3), page)
    assert [id(page) for page in pages[count:]] == [id(other)]
    del pages[count:]


def test_a_change_of_form_that_is_taken_back_leaves_the_managers_as_they_were(manager):
    pages = bitsandbytes.functional.GlobalPageManager.get_instance().paged_tensors
    count = len(pages)
    model = llama()
    drt = DynamicRank(model, DRTConfig(schedule="dense@0 factored@50%", rank=32), max_steps=4)
    drt.apply(0)
    weight, embedding = model.get_submodule(LAYER).weight, model.model.embed_tokens.weight
    manager.override_config(weight, "optim_bits", 32)
    manager.register_module_override(model.model.embed_tokens, "weight", {"optim_bits": 32})
    optimizer = bnb.AdamW(model.parameters(), lr=1e-3, optim_bits=8)
    step(model, optimizer)
    pages.append(optimizer.state[weight]["state1"])
    before = copy.deepcopy((manager.pid2config, manager.index2config)), [id(page) for page in pages]
    assert before[0][1]
    undo = [drt.remembered(), remembered(optimizer)]
    drt.begin_step(2, optimizer)
    assert ((manager.pid2config, manager.index2config), [id(page) for page in pages]) != before
    for each in undo:
        each()
    assert ((manager.pid2config, manager.index2config), [id(page) for page in pages]) == before
    del pages[count:]
    optimizer.state.clear()
    step(model, optimizer)
    assert {p for p in optimizer.state if p.numel() >= 4096 and bits(optimizer, p) == 32} == {weight, embedding}


# ---- checkpoints


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda weights: bnb.AdamW(weights, lr=1e-3, optim_bits=8), "absmax2"),
        (lambda weights: bnb.AdEMAMix(weights, lr=1e-3, optim_bits=8), "absmax1"),
        (lambda weights: bnb.AdEMAMix(weights, lr=1e-3), "state1"),
        (lambda weights: bnb.LAMB(weights, lr=1e-3), "unorm_vec"),
    ],
    ids=["adamw_8bit", "ademamix_8bit", "ademamix", "lamb"],
)
def test_a_checkpoint_is_looked_at_inside_of_what_the_library_wraps(tmp_path, make, key):
    model, optimizer = switched(lambda model: make(model.parameters()))
    step(model, optimizer, 2)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    check_optimizer(tmp_path, optimizer)
    state = optimizer.state_dict()
    wrapped = next(
        entry for entries in state["state"].values() for entry in entries.values() if isinstance(entry, dict)
    )
    wrapped[key] = torch.zeros(5, 7)
    torch.save(state, tmp_path / "optimizer.pt")
    with pytest.raises(CheckpointError, match=rf"holds {key} of shape \(5, 7\)"):
        check_optimizer(tmp_path, optimizer)
