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
from hf_drt.checkpoint.declaration import declaration, undeclared
from hf_drt.targets.surgery import Swap, replace


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
    undo = drt.remembered()
    drt.load_state_dict(states[1])
    assert declared(model) == set()
    undo()
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


# ---- a configuration that is shared, and containers


def test_a_configuration_shared_with_a_teacher_stays_as_it_is(tmp_path):
    config = tiny.llama().config
    torch.manual_seed(0)
    teacher, student = T.LlamaForCausalLM(config), T.LlamaForCausalLM(config)
    before = config.to_json_string(use_diff=False)
    DynamicRank(student, DRTConfig(schedule="factored@0", rank_multiple=4), max_steps=1).apply(0)
    assert config.to_json_string(use_diff=False) == before
    assert teacher.config is config
    assert not hasattr(config, "_is_quantized")
    for model, name in ((teacher, "teacher"), (student, "student")):
        model.save_pretrained(tmp_path / name)
        again = T.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(tiny.logits(again, tiny.batch()), tiny.logits(model, tiny.batch()))


def test_two_models_of_one_configuration_may_end_in_different_forms(tmp_path):
    config = tiny.llama().config
    models = {name: T.LlamaForCausalLM(config) for name in ("factored", "dense")}
    drt = {
        name: DynamicRank(model, DRTConfig(schedule="factored@0", rank_multiple=4), max_steps=1)
        for name, model in models.items()
    }
    for controller in drt.values():
        controller.apply(0)
    drt["dense"].to_dense()
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        again = T.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(tiny.logits(again, tiny.batch()), tiny.logits(model, tiny.batch()))


@pytest.mark.parametrize("kind", ["llama", "t5", "vit"])
def test_the_layers_go_on_seeing_what_is_set_on_the_models_configuration(kind):
    model = tiny.MODELS[kind]()
    given = model.config
    held = [(m, key) for m in model.modules() for key, value in vars(m).items() if value is given]
    mixed(model=model)
    declare(model)
    assert model.config is not given
    assert held
    assert all(vars(module)[key] is model.config for module, key in held)
    model.set_attn_implementation("eager")
    assert all(vars(module)[key]._attn_implementation == "eager" for module, key in held)


def test_a_part_of_a_configuration_that_a_submodel_holds_is_the_copys_part():
    config = T.CLIPConfig(
        text_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 8, "patch_size": 4,
        },
    )  # fmt: skip
    model = T.CLIPModel(config)
    before = config.to_json_string(use_diff=False)
    DynamicRank(model, DRTConfig(schedule="factored@0", rank_multiple=4), max_steps=1).apply(0)
    assert config.to_json_string(use_diff=False) == before
    assert model.text_model.config is model.config.text_config is not config.text_config
    assert model.vision_model.config is model.config.vision_config is not config.vision_config


class Container(nn.Module):
    """With what a container of another library may have: a way to save, and the configuration of what is inside."""

    def __init__(self):
        super().__init__()
        self.first, self.second = tiny.llama(), tiny.bert()

    @property
    def config(self):
        return self.first.config

    def save_pretrained(self, folder):
        self.first.save_pretrained(folder / "first")
        self.second.save_pretrained(folder / "second")


def test_every_model_inside_a_container_is_declared_under_its_own_names(tmp_path):
    model = Container()
    controller = DynamicRank(model, DRTConfig(schedule="factored@0", rank_multiple=4), max_steps=1)
    controller.apply(0)
    model.save_pretrained(tmp_path)
    for name, cls in (("first", T.AutoModelForCausalLM), ("second", T.AutoModelForMaskedLM)):
        inner = getattr(model, name)
        assert declared(inner) == low_rank(inner) != set()
        again = cls.from_pretrained(tmp_path / name)
        assert forms(again) == forms(inner)
        assert torch.equal(tiny.logits(again, tiny.batch()), tiny.logits(inner, tiny.batch()))
    controller.to_dense()
    assert declared(model.first) == declared(model.second) == set()


def test_undeclared_is_of_every_model_inside_a_container():
    model = Container()
    DynamicRank(model, DRTConfig(schedule="factored@0", rank_multiple=4), max_steps=1).apply(0)
    with undeclared(model):
        assert declared(model.first) == declared(model.second) == set()
    assert declared(model.first)
    assert declared(model.second)
