"""Trained weights without the mark of from_pretrained are not truncated in silence where 'lowrank' stands."""

import copy
import logging

import pytest
import tiny
import torch
import transformers as T
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_drt import Adapter, DRTConfig, DRTTrainer, DynamicRank, Factored, form_of
from hf_drt.planning.evidence import evidence_of_training
from tests.sweep.catalog import model_class, model_types
from tests.sweep.shrink import VARIANTS, tiny_config

CONFIG = DRTConfig(schedule="lowrank@0 dense@50%", rank=4)
REFUSED = r"'lowrank' in the schedule .* but the model has been trained: .* Set start='pretrained' .* start='scratch'"
KINDS = [
    "llama", "gpt2", "bert", "t5", "vit", "mamba", "mamba2", "rwkv", "wav2vec2", "gemma", "gemma3_text", "resnet",
    "efficientnet", "regnet", "qwen3_moe", "whisper", "xlnet", "mobilenet_v2", "falcon_h1", "convnext", "sam", "detr",
]  # fmt: skip


def trained(make=tiny.llama, **changes):
    """Weights of a short plain run, in a new model: load_state_dict, as users do with their own."""
    torch.manual_seed(1)
    model = make(**changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    kind = "resnet" if make is tiny.resnet else "llama"
    for _ in range(3):
        model(**tiny.batch(kind)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    new = make(**changes)
    new.load_state_dict(model.state_dict())
    return new


# ---- what is seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_model_shows_no_training_and_the_generator_is_left_alone(kind):
    torch.manual_seed(0)
    model = model_class(model_types()[kind])(tiny_config(kind, VARIANTS[0]))
    before = torch.get_rng_state()
    seen = evidence_of_training(model)
    assert seen.sign is None
    assert seen.looked > 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2, tiny.bert, tiny.t5])
def test_three_steps_are_seen_in_the_weights_of_the_norms(make):
    model = make()
    model.load_state_dict(trained(make).state_dict())
    name = evidence_of_training(model).sign.partition(" is not constant, as it is at initialisation")[0]
    assert len(model.get_parameter(name).unique()) > 1


def test_running_statistics_are_seen_and_named():
    model = tiny.resnet()
    with torch.no_grad():
        model.train()(**tiny.batch("resnet"))  # no weight has changed
    sign = evidence_of_training(model).sign
    assert "running_mean is not constant" in sign or "num_batches_tracked is 1" in sign
    model = nn.Sequential(nn.BatchNorm1d(1))
    model[0].num_batches_tracked += 3
    assert evidence_of_training(model).sign == "0.num_batches_tracked is 3"


def test_dtype_and_meta_device_do_not_matter():
    assert evidence_of_training(tiny.llama().bfloat16()).sign is None
    assert evidence_of_training(trained().bfloat16()).sign is not None
    seen = evidence_of_training(tiny.llama().to("meta"))
    assert (seen.sign, seen.looked) == (None, 5)


def test_a_norm_that_the_model_draws_at_random_shows_nothing():
    class Drawn(T.LlamaModel):
        def _init_weights(self, module):
            super()._init_weights(module)
            if "Norm" in type(module).__name__:
                nn.init.normal_(module.weight, 1.0, 0.02)

    config = tiny.llama().config
    assert evidence_of_training(Drawn(config)).sign is None
    assert evidence_of_training(T.LlamaForCausalLM(config)).sign is None
    assert len(Drawn(config).norm.weight.unique()) > 1


# ---- what follows


def test_own_weights_in_a_loop_need_a_start():
    model = trained()
    expected = tiny.logits(model, tiny.batch())
    with pytest.raises(ValueError, match=REFUSED) as refused:
        DynamicRank(model, CONFIG, max_steps=10)
    assert "input_layernorm.weight is not constant" in str(refused.value)
    assert torch.equal(tiny.logits(model, tiny.batch()), expected)
    kept = DynamicRank(model, DRTConfig(schedule=CONFIG.schedule, rank=4, start="pretrained"), max_steps=10)
    kept.apply(0)
    assert torch.equal(tiny.logits(model, tiny.batch()), expected)
    assert isinstance(form_of(model.get_submodule(next(iter(kept.targets)))), Adapter)


def test_own_weights_may_be_truncated_on_purpose():
    model = trained()
    drt = DynamicRank(model, DRTConfig(schedule=CONFIG.schedule, rank=4, start="scratch"), max_steps=10)
    drt.apply(0)
    assert {form_of(model.get_submodule(name)) for name in drt.targets} == {Factored(4)}


def test_own_weights_in_a_trainer_need_a_start_from_the_beginning(tmp_path):
    with pytest.raises(ValueError, match=REFUSED):
        tiny.trainer(tmp_path, trained(), drt_schedule=CONFIG.schedule, drt_rank=4)
    tiny.trainer(tmp_path, trained(), drt_schedule=CONFIG.schedule, drt_rank=4, drt_start="pretrained")
    tiny.trainer(tmp_path, trained(), drt_schedule="factored@0 dense@50%", drt_rank=4)  # that is written out


def test_weights_of_a_plain_trainer_in_the_same_process_are_own_weights_too(tmp_path):
    model = tiny.llama()
    arguments = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, arguments, train_dataset=tiny.dataset()).train()
    with pytest.raises(ValueError, match=REFUSED):
        DynamicRank(model, CONFIG, max_steps=10)


def test_a_batch_norm_tells_as_well():
    with pytest.raises(ValueError, match=r"normalization\.(weight|running_mean) is not constant"):
        DynamicRank(trained(tiny.resnet), DRTConfig(schedule="fixed", rank=4), max_steps=10)


# ---- what is remembered


def test_a_second_run_on_one_model_is_no_model_that_came_trained(tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.llama(), drt_schedule="lowrank@0 dense@50%", drt_rank=4, max_steps=4)
    trainer.train()
    assert evidence_of_training(trainer.model).sign is not None
    trainer.train()
    assert [phase.kind for phase in trainer.drt.plan.phases] == ["factored", "dense"]
    DynamicRank(trainer.model, CONFIG, max_steps=10)  # a loop of one's own afterwards
    with pytest.raises(ValueError, match=REFUSED):
        DynamicRank(copy.deepcopy(trainer.model), CONFIG, max_steps=10)


def test_a_start_that_was_said_once_holds_for_the_model():
    model = trained()
    DynamicRank(model, DRTConfig(schedule=CONFIG.schedule, rank=4, start="pretrained"), max_steps=10)
    assert [phase.kind for phase in DynamicRank(model, CONFIG, max_steps=10).plan.phases] == ["adapter", "dense"]


def test_the_constructor_of_a_trainer_remembers_nothing(tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.llama(), drt_schedule=CONFIG.schedule, drt_rank=4)
    trainer.model.load_state_dict(trained().state_dict())
    with pytest.raises(ValueError, match=REFUSED):
        trainer.train()


@pytest.mark.parametrize("stop", [3, 9], ids=["in factors", "in adapters"])
@pytest.mark.parametrize("again", [False, True], ids=["new trainer", "same trainer"])
def test_a_run_that_goes_on_is_as_it_began_bitwise(tmp_path, stop, again):
    settings = {
        "drt_schedule": "paper", "drt_rank": 4, "max_steps": 12, "save_strategy": "steps", "save_steps": 3,
        "gradient_accumulation_steps": 1,
    }  # fmt: skip
    whole = tiny.trainer(tmp_path, tiny.llama(), **settings)
    whole.train()
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    resumed = whole if again else tiny.trainer(tmp_path, tiny.llama(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert [phase.kind for phase in resumed.drt.plan.phases] == ["factored", "dense", "adapter"]
    found = resumed.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_each_model_of_model_init_is_looked_at(tmp_path):
    models = [tiny.llama(), tiny.llama(), trained()]
    arguments = tiny.arguments(tmp_path, drt_schedule=CONFIG.schedule, drt_rank=4, max_steps=2)
    trainer = DRTTrainer(args=arguments, train_dataset=tiny.dataset(), model_init=lambda: models.pop(0))
    trainer.train()
    with pytest.raises(ValueError, match=REFUSED):
        trainer.train()


# ---- what the log says


def test_the_log_says_what_a_new_model_was_taken_for(caplog):
    caplog.set_level(logging.INFO, "hf_drt")
    DynamicRank(tiny.llama(), CONFIG, max_steps=10)
    (record,) = [r for r in caplog.records if "lowrank" in r.message]
    assert (record.levelname, "the weights are new" in record.message) == ("INFO", True)
    caplog.clear()
    blind = tiny.llama()
    for layer in blind.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
    blind.model.norm = nn.Identity()
    DynamicRank(blind, CONFIG, max_steps=10)
    (record,) = [r for r in caplog.records if "lowrank" in r.message]
    assert record.levelname == "WARNING"
    assert "there is no normalisation layer that would show training" in record.message
    caplog.clear()
    DynamicRank(blind, CONFIG, max_steps=10)
    DynamicRank(tiny.llama(), DRTConfig(schedule=CONFIG.schedule, rank=4, start="scratch"), max_steps=10)
    assert "lowrank" not in caplog.text


def test_a_second_run_that_truncates_what_the_first_has_trained_says_so(tmp_path, caplog):
    trainer = tiny.trainer(tmp_path, max_steps=4, drt_schedule="lowrank@0 dense@50%")
    trainer.train()
    assert "its weights are truncated" not in caplog.text
    trainer.train()
    assert "which has trained it since (" in caplog.text
    assert "its weights are truncated. Set start='pretrained'" in caplog.text
