"""Training goes on from a native checkpoint as if the model had never left memory."""

import copy
import json

import mixed as kit
import pytest
import tiny
import torch
import transformers as T
from mixed import difference, forms, mixed
from safetensors import safe_open
from safetensors.torch import load_file

from hf_drt import Adapter, DRTConfig, DRTTrainer, DynamicRank, Factored, find_targets
from hf_drt.checkpoint.declaration import declaration

CYCLE = "adapter:4@0 factored:4@2 dense@4 factored:6@6"


def trainer(folder, model, kind="llama", cls=DRTTrainer, **changes):
    """Of a model that is to keep the form of its last phase."""
    defaults = {"drt_schedule": CYCLE, "drt_export": "native", "max_steps": 8}
    return tiny.trainer(folder, model, "llama" if kind == "mixtral" else kind, cls, **{**defaults, **changes})


def equal(model, other) -> bool:
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(state[key], others[key]) for key in state)


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_a_run_on_a_loaded_model_is_that_on_the_model_in_memory(tmp_path, kind):
    model = kit.MODELS[kind]()
    trainer(tmp_path / "first", model, kind, drt_schedule="factored:4@0 adapter:6@2", max_steps=4).train()
    model.save_pretrained(tmp_path / "native")
    loaded = tiny.AUTO[kind].from_pretrained(tmp_path / "native")
    assert set(forms(loaded).values()) == {Adapter(6)}
    for name, again in (("a", model), ("b", loaded)):
        trainer(tmp_path / name, again, kind).train()
    assert set(forms(loaded).values()) == {Factored(6)}
    assert equal(loaded, model)
    loaded.save_pretrained(tmp_path / "c")
    assert difference(tiny.AUTO[kind].from_pretrained(tmp_path / "c"), loaded, kind) == 0


def test_a_loaded_model_resumes_bitwise(tmp_path):
    mixed().save_pretrained(tmp_path / "native")
    load = T.AutoModelForCausalLM.from_pretrained
    whole = trainer(tmp_path / "a", load(tmp_path / "native"), save_strategy="steps", save_steps=3)
    whole.train()
    for step in (3, 6):
        again = trainer(tmp_path / "b", load(tmp_path / "native"))
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert equal(again.model, whole.model)


def test_the_first_phase_converts_from_the_form_that_each_layer_is_in(tmp_path):
    mixed().save_pretrained(tmp_path)
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = model.config.quantization_config["layers"]
    targets = find_targets(model).targets
    assert layers.keys() < targets.keys()
    drt = DynamicRank(model, DRTConfig(schedule="dense@0"), max_steps=1)
    assert drt.targets.keys() == find_targets(tiny.llama()).targets.keys()
    assert drt.apply(0).layers == len(layers)
    stored = load_file(tmp_path / "model.safetensors")
    for name, entry in layers.items():
        if entry["form"] == "factored":
            expected = stored[f"{name}.U"] @ stored[f"{name}.V"]
        else:
            update = stored[f"{name}.lora_B"] @ stored[f"{name}.lora_A"]
            expected = stored[f"{name}.base"] + entry["alpha"] / entry["rank"] * update
        torch.testing.assert_close(model.get_submodule(name).weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_layers_in_the_form_of_the_first_phase_stay_as_they_are(tmp_path):
    mixed().save_pretrained(tmp_path)
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    kept = dict(model.model.layers[0].self_attn.k_proj.named_parameters())
    DynamicRank(model, DRTConfig(schedule="factored@0", rank=4), max_steps=1).apply(0)
    assert set(forms(model).values()) == {Factored(4)}
    assert all(p is kept[name] for name, p in model.model.layers[0].self_attn.k_proj.named_parameters())


def test_lowrank_means_adapters_for_a_loaded_model(tmp_path):
    mixed().save_pretrained(tmp_path)
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path)
    drt = DynamicRank(model, DRTConfig(schedule="lowrank@0", rank=4), max_steps=1)
    assert [phase.kind for phase in drt.plan.phases] == ["adapter"]


def test_factored_phases_warn_of_truncation_only_where_nothing_is_factored_yet(tmp_path, caplog):
    for model, warns in ((tiny.llama(), True), (mixed(), False)):
        model.save_pretrained(tmp_path)
        caplog.clear()
        loaded = T.AutoModelForCausalLM.from_pretrained(tmp_path)
        DynamicRank(loaded, DRTConfig(schedule="factored@0", rank=4), max_steps=1)
        assert ("truncates pretrained weights" in caplog.text) is warns


def test_a_plain_trainer_trains_and_saves_a_loaded_model(tmp_path):
    mixed().save_pretrained(tmp_path / "native")
    model = T.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    before = copy.deepcopy(model)
    plain = T.Trainer(
        model=model,
        args=T.TrainingArguments(tmp_path / "out", max_steps=3, report_to=[], save_steps=2, disable_tqdm=True),
        train_dataset=tiny.dataset(),
    )
    plain.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {name for name, p in model.named_parameters() if not name.endswith(".base")}
    plain.save_model()
    assert equal(T.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)
    again = T.Trainer(
        model=T.AutoModelForCausalLM.from_pretrained(tmp_path / "native"), args=plain.args, train_dataset=tiny.dataset()
    )
    again.train(resume_from_checkpoint=True)
    assert equal(again.model, model)


# ---- what the trainer writes


@pytest.mark.parametrize("kind", tiny.AUTO)
@pytest.mark.parametrize("last", ["factored", "adapter", "dense"])
def test_checkpoints_load_natively_in_every_phase(tmp_path, kind, last):
    model = kit.MODELS[kind]()
    schedule = f"factored:4@0 dense@1 {last}:4@2" if last != "dense" else "factored:4@0 dense@1"
    trainer(tmp_path, model, kind, drt_schedule=schedule, max_steps=3, save_strategy="steps", save_steps=3).train()
    loaded = tiny.AUTO[kind].from_pretrained(tmp_path / "checkpoint-3")
    assert forms(loaded) == forms(model)
    assert equal(loaded, model)


def test_the_best_model_is_declared_in_its_own_form(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_strategy": "steps"}
    t = trainer(tmp_path, tiny.llama(), load_best_model_at_end=True, learning_rate=10.0, **options)
    t.train()
    assert t.state.best_model_checkpoint.endswith("checkpoint-2")
    assert set(forms(t.model).values()) == {Adapter(4)}
    assert t.model.config.quantization_config == declaration(t.model)


@pytest.mark.parametrize("kind", tiny.AUTO)
def test_save_model_writes_what_a_plain_model_writes(tmp_path, kind):
    kit.MODELS[kind]().save_pretrained(tmp_path / "plain")
    mixed(kind).save_pretrained(tmp_path / "native")
    for name, model in (
        ("new", kit.MODELS[kind]()),
        ("pretrained", tiny.AUTO[kind].from_pretrained(tmp_path / "plain")),
        ("native", tiny.AUTO[kind].from_pretrained(tmp_path / "native")),
    ):
        t = trainer(tmp_path / "run", model, kind, drt_schedule="adapter:4@0 factored:4@1", max_steps=2)
        t.train()
        t.args.drt_export = "dense"
        t.save_model(tmp_path / name)
        assert model.config.quantization_config == declaration(model)  # the model itself keeps its form
        t = trainer(tmp_path / "run", tiny.AUTO[kind].from_pretrained(tmp_path / name), kind, drt_export="dense")
        t.save_model(tmp_path / f"{name}-0")  # before training, too
        for folder in (f"{name}-0", name):
            assert "quantization_config" not in json.loads((tmp_path / folder / "config.json").read_text())
            assert shapes(tmp_path / folder) == shapes(tmp_path / "plain")
        assert difference(tiny.AUTO[kind].from_pretrained(tmp_path / name), model, kind) <= 1e-5


def shapes(folder) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118


def test_a_second_trainer_on_the_same_model(tmp_path):
    model = tiny.vit()
    for number in range(2):
        t = trainer(tmp_path / str(number), model, "vit")
        t.train()
        assert model.config.quantization_config == declaration(model)
    t.drt.to_dense()
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    tiny.vit().save_pretrained(tmp_path / "plain")
    assert shapes(tmp_path / "dense") == shapes(tmp_path / "plain")
