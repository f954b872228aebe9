"""config.json and the names in the files follow the forms that a model is in, by every way in which it changes them."""

import copy
import json

import pytest
import tiny
import torch
import transformers as T
from mixed import forms, mixed
from torch import nn

from hf_drt import Dense, DRTConfig, DynamicRank, convert, declare
from hf_drt.declaration import declaration, undeclared
from hf_drt.surgery import Swap, replace


def declared(model) -> set[str]:
    """Names of the declared layers, as config.json would have them."""
    return set(json.loads(model.config.to_json_string()).get("quantization_config", {"layers": ()})["layers"])


def low_rank(model) -> set[str]:
    return {name for name, form in forms(model).items() if form != Dense()}


def make_dense(model) -> None:
    layers = {name: model.get_submodule(name) for name in low_rank(model)}
    replace(model, [Swap(name, layer, convert(layer, Dense()).module) for name, layer in layers.items()])
    declare(model)


def test_without_low_rank_layers_nothing_is_declared():
    model = tiny.llama()
    before = vars(model.config).copy()
    declare(model)
    assert declaration(model) is None
    assert vars(model.config) == before
    assert "_weight_conversions" not in vars(model)


@pytest.mark.parametrize("own", [False, True])
def test_a_model_that_is_dense_again_is_as_it_was(own):
    model = tiny.vit()
    conversions = ["of its own"]
    if own:
        model._weight_conversions = conversions
    config, attributes = vars(model.config).copy(), set(vars(model))
    mixed(model=model)
    declare(model)
    assert declared(model) == low_rank(model) != set()
    assert model._weight_conversions == model.vit._weight_conversions == []
    make_dense(model)
    assert declared(model) == set()
    assert set(vars(model)) == attributes
    assert getattr(model, "_weight_conversions", conversions) is conversions
    assert vars(model.config) == config


def test_every_verb_of_the_controller_declares():
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule="factored@0 dense@1 adapter@2", rank=4), max_steps=3)
    states = []
    for step, kind in enumerate(("factored", "dense", "adapter")):
        drt.apply(step)
        states.append(drt.state_dict())
        kinds = {e["form"] for e in getattr(model.config, "quantization_config", {"layers": {}})["layers"].values()}
        assert kinds == ({kind} if kind != "dense" else set())
    swaps = drt.load_state_dict(states[1])
    assert declared(model) == set()
    drt.undo_load(swaps, 2)
    assert declared(model) == low_rank(model) == set(drt.targets)
    drt.to_dense()
    assert declared(model) == set()


def test_a_copy_is_on_its_own():
    model = mixed()
    other = copy.deepcopy(model)
    make_dense(other)
    assert declared(other) == set()
    assert declared(model) == low_rank(model) != set()
    assert model._weight_conversions == []


def test_for_a_dense_export_the_model_looks_dense():
    model = mixed("vit")
    with undeclared(model):
        assert declared(model) == set()
        assert not hasattr(model, "_weight_conversions")
    assert declared(model) == low_rank(model)
    assert model._weight_conversions == []


def interrupted_export(model):
    with undeclared(model):
        raise KeyboardInterrupt


def test_an_interrupted_export_leaves_the_declaration():
    model = mixed()
    with pytest.raises(KeyboardInterrupt):
        interrupted_export(model)
    assert declared(model) == low_rank(model)


def test_a_compiled_model_is_declared_under_its_own_names():
    model = tiny.llama()
    DynamicRank(torch.compile(model), DRTConfig(schedule="factored@0", rank=4), max_steps=1).apply(0)
    assert declared(model) == low_rank(model) != set()


def test_a_distributed_model_is_declared_under_its_own_names(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny.llama()
        wrapped = nn.parallel.DistributedDataParallel(model)
        DynamicRank(wrapped, DRTConfig(schedule="factored@0", rank=4), max_steps=1).apply(0)
        assert declared(model) == low_rank(model) != set()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("config", [None, {"hidden_size": 32}])
def test_a_model_that_is_not_of_transformers_is_left_alone(config):
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)) for _ in range(2))
    model.config = config
    DynamicRank(model, DRTConfig(schedule="factored@0", rank=4), max_steps=1).apply(0)
    assert model.config == config
    assert "_weight_conversions" not in vars(model)


def test_a_part_of_another_library_is_left_alone():
    model = tiny.llama()
    part = model.model.layers[0].mlp
    part.config, part.save_pretrained = {"hidden_size": 32}, print
    mixed(model=model)
    assert declared(model) == low_rank(model) != set()
    assert part.config == {"hidden_size": 32}


def test_another_methods_declaration_is_not_overwritten(caplog):
    for block in ({"quant_method": "gptq"}, T.EetqConfig()):
        model = tiny.llama()
        model.config.quantization_config = block
        caplog.clear()
        mixed(model=model)
        assert "has no room for a second method" in caplog.text
        make_dense(model)
        assert model.config.quantization_config is block
