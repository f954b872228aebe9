"""A model in which PEFT has changed layers is refused by everything that selects layers; a merged one is not."""

import peft
import pytest
import tiny
import transformers as T
from torch import nn

from hf_drt import DRTCallback, DRTConfig, DynamicRank, find_targets
from hf_drt.compress import compress
from hf_drt.export import load_peft_adapter

LORA = peft.LoraConfig(target_modules=["q_proj", "up_proj"])
MODELS = {
    "get_peft_model": (lambda: peft.get_peft_model(tiny.llama(), LORA), "the model is a PeftModel of PEFT"),
    "of a task": (
        lambda: peft.get_peft_model(tiny.llama(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
        "the model is a PeftModelForCausalLM of PEFT",
    ),
    "injected": (
        lambda: peft.inject_adapter_in_model(LORA, tiny.llama()),
        "model.layers.0.self_attn.q_proj is a Linear of PEFT",
    ),
    "the base model": (
        lambda: peft.get_peft_model(tiny.llama(), LORA).get_base_model(),
        "model.layers.0.self_attn.q_proj is a Linear of PEFT",
    ),
    "inside a container": (
        lambda: nn.Sequential(peft.get_peft_model(tiny.llama(), LORA)),
        "0 is a PeftModel of PEFT",
    ),
    "IA3": (
        lambda: peft.get_peft_model(
            tiny.llama(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        ).get_base_model(),
        "k_proj is a Linear of PEFT",
    ),
    "saved modules": (
        lambda: peft.get_peft_model(
            tiny.llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        ).base_model.model.lm_head,
        "the model is a ModulesToSaveWrapper of PEFT",
    ),
    "prompts": (
        lambda: peft.get_peft_model(
            tiny.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        "the model is a PeftModelForCausalLM of PEFT",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "found"), MODELS.values(), ids=MODELS.keys())
def test_every_way_in_is_refused_with_the_way_out(tmp_path, make, found):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    message = f"does not support a PEFT model, .* already: .*{found}.*merge_and_unload.*requires_grad_"
    with pytest.raises(ValueError, match=message):
        find_targets(model)
    with pytest.raises(ValueError, match=message):
        DynamicRank(model, DRTConfig(schedule="factored@0"), 4)
    with pytest.raises(ValueError, match=message):
        compress(model, rank=2)
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("way", ["get_peft_model", "injected"])
def test_a_plain_trainer_with_the_callback_is_refused_too(tmp_path, way):
    args = T.TrainingArguments(str(tmp_path), report_to=[], max_steps=2)
    with pytest.raises(ValueError, match="does not support a PEFT model"):
        T.Trainer(
            MODELS[way][0](), args, train_dataset=tiny.dataset(), callbacks=[DRTCallback(DRTConfig(schedule="paper"))]
        )


def test_an_adapter_is_not_loaded_beside_one_of_pefts(tmp_path):
    peft.get_peft_model(tiny.llama(), LORA).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not support a PEFT model"):
        load_peft_adapter(peft.inject_adapter_in_model(LORA, tiny.llama()), str(tmp_path))


@pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
def test_a_model_that_peft_has_left_is_fine(tmp_path, way):
    model = getattr(peft.get_peft_model(tiny.llama(), LORA), way)()
    with pytest.raises(ValueError, match="14 frozen"):  # PEFT leaves them so
        find_targets(model)
    model.requires_grad_(True)
    assert list(find_targets(model).targets) == list(find_targets(tiny.llama()).targets)
    tiny.trainer(tmp_path, model, max_steps=4).train()
