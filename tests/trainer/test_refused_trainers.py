"""What a trainer, its engine or its data cannot do is refused before the first step."""

from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_drt import DRTCallback, DRTTrainer
from hf_drt.planning import TargetLayers
from hf_drt.trainer.refusals import refuse_layers, refuse_unsupported

STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


def with_attributes(**attributes) -> nn.Module:
    model = tiny.llama()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def with_lora() -> nn.Module:
    return peft.get_peft_model(tiny.llama(), peft.LoraConfig(target_modules=["q_proj"]))


# transformers itself refuses a quantized model, unless its quantizer says that it can be trained.
TRAINABLE = SimpleNamespace(is_trainable=True, is_qat_trainable=True)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            with_lora,
            {},
            r"does not support a PEFT model, which has changed .*: the model is a PeftModel",
        ),
        (
            lambda: with_attributes(is_quantized=True, hf_quantizer=TRAINABLE),
            {},
            r"does not support a quantized model\. Train the original model\. Or unset drt_schedule",
        ),
        (tiny.llama, {"drt_include": ["conv"]}, r"no layer to train in changing rank: .* 14 not matched by include"),
    ],
    ids=["peft", "quantized", "no target"],
)
def test_a_trainer_refuses_what_would_go_wrong_in_silence(tmp_path, model, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.trainer(tmp_path, model(), **changes)


def fsdp(version: int) -> SimpleNamespace:
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version, cpu_offload=None)))


def engine(**changes) -> SimpleNamespace:
    """What the refusals read of a trainer."""
    args = {
        "n_gpu": 0, "world_size": 1, "push_to_hub": False,
        "hub_strategy": HubStrategy.EVERY_SAVE, "save_strategy": SaveStrategy.STEPS,
    }  # fmt: skip
    inner = {key: changes.pop(key) for key in list(changes) if key in args}
    outer = {
        "is_deepspeed_enabled": False, "is_fsdp_enabled": False, "eval_dataset": None, "lr_scheduler": None,
        "model": nn.Linear(1, 1),
    }  # fmt: skip
    return SimpleNamespace(args=SimpleNamespace(**args | inner), **outer | changes)


@pytest.mark.parametrize(
    ("found", "config", "message"),
    [
        (
            {"is_fsdp_enabled": True, "accelerator": fsdp(1)},
            {},
            r"support FSDP1, which flattens .*'version': 2.*torchrun",
        ),
        ({"is_fsdp_xla_enabled": True}, {}, r"does not support FSDP on XLA, .*DistributedDataParallel"),
        ({"n_gpu": 2}, {}, r"does not support nn\.DataParallel, which replicates .* torchrun or accelerate launch"),
        ({"model": SimpleNamespace(_tp_size=2)}, {}, r"does not support tensor parallelism, .* without tp_plan"),
        (
            {"model": SimpleNamespace(is_distributed_loading_by_transformers=True)},
            {},
            r"a model that transformers has sharded while loading\. Load it without distributed_config",
        ),
        (
            {},
            {"tag_phases": True},
            r"tag_phases makes revisions .* push_to_hub is False, hub_strategy is every_save\. Set push_to_hub with",
        ),
        (
            {"push_to_hub": True, "hub_strategy": HubStrategy.END},
            {"tag_phases": True},
            r"push_to_hub is True, hub_strategy is end\. .* hub_strategy=every_save, checkpoint or all_checkpoints; or",
        ),
        (
            {},
            {"evaluate_at_switch": True},
            r"evaluate_at_switch needs an eval_dataset, got None\. Pass one, or turn it",
        ),
        (
            {"model": tiny.mixtral()},
            {"export": "adapter"},
            r"export=adapter saves a LoRA of PEFT, .* and model\.layers\.0\.mlp\.experts\..*_proj is selected\. Keep",
        ),
    ],
)
def test_an_engine_that_is_not_supported_is_refused(found, config, message):
    refuse_unsupported(engine(), tiny.config())
    with pytest.raises(ValueError, match=message):
        refuse_all(engine(**found), tiny.config(**config))


def refuse_all(trainer, config):
    """What a trainer refuses before and after it has looked for the layers of its model."""
    refuse_unsupported(trainer, config)
    refuse_layers(trainer, config, TargetLayers.of(trainer.model, config))


@pytest.mark.parametrize(
    ("found", "config"), [({"is_fsdp_enabled": True, "accelerator": fsdp(2)}, {}), ({}, {"export": "adapter"})]
)
def test_a_mixture_whose_experts_stay_dense_is_not_refused(found, config):
    refuse_all(engine(model=tiny.mixtral(), **found), tiny.config(exclude=["experts"], **config))


def test_experts_that_change_form_and_shards_on_the_cpu_are_not_refused_under_fsdp2():
    found = fsdp(2)
    found.state.fsdp_plugin.cpu_offload = CPUOffloadPolicy()
    refuse_all(engine(model=tiny.mixtral(), is_fsdp_enabled=True, accelerator=found), tiny.config())


@pytest.mark.parametrize("strategy", [s for s in HubStrategy if s != HubStrategy.END])
def test_tags_are_allowed_with_pushing_during_training(strategy):
    refuse_unsupported(engine(push_to_hub=True, hub_strategy=strategy), tiny.config(tag_phases=True))


def test_evaluation_at_a_switch_without_data_is_refused(tmp_path):
    args = tiny.arguments(tmp_path, drt_evaluate_at_switch=True)
    with pytest.raises(ValueError, match=r"evaluate_at_switch needs an eval_dataset, got None"):
        DRTTrainer(tiny.llama(), args, train_dataset=tiny.dataset())


@pytest.mark.parametrize(
    "setting",
    [{"factored_lr_scale": 2.0}, {"adapter_lr_scale": 2.0}, {"left_lr_scale": 2.0}, {"frobenius_decay": True}],
)
def test_a_scheduler_made_before_the_form_groups_is_refused(tmp_path, setting):
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(
        ValueError, match=r": this adds parameter groups, but a scheduler was passed .*optimizers=\(optimizer, Non"
    ):
        DRTTrainer(
            model,
            tiny.arguments(tmp_path, drt_schedule=None),
            train_dataset=tiny.dataset(),
            optimizers=(optimizer, scheduler),
            drt=tiny.config(**setting),
        )


@pytest.mark.parametrize("drt", [{"schedule": tiny.PHASES}, 4, ["factored@0"]], ids=str)
def test_settings_of_another_type_are_refused(tmp_path, drt):
    with pytest.raises((ValueError, TypeError), match=r"drt.*DRTConfig"):
        DRTTrainer(tiny.llama(), tiny.arguments(tmp_path), train_dataset=tiny.dataset(), drt=drt)


def test_a_second_callback_is_refused(tmp_path):
    args, data = tiny.arguments(tmp_path), tiny.dataset()
    with pytest.raises(ValueError, match="DRTCallback"):
        DRTTrainer(tiny.llama(), args, train_dataset=data, callbacks=[DRTCallback("factored:4@0 dense@50%")])


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from tiny.dataset()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 1}, r"phase boundaries cross: .* \(of 1 update steps\)"),
        ({"drt_rank_ratio": 1.0}, r"leaves all 14 layers dense"),
        ({"drt_schedule": "factored@0 dense@lr<0.5", "lr_scheduler_type": "constant"}, r"'@lr<0\.5' is never reached"),
        (
            {"drt_schedule": "factored@0 dense@lr<0.5", "learning_rate": 0.0},
            r"'@lr<0\.5' needs a learning rate above 0",
        ),
        (
            {"drt_schedule": "factored@0 dense@lr<0.5", "lr_scheduler_type": "reduce_lr_on_plateau", **STEPS},
            r"'@lr<0\.5' needs a learning-rate schedule that can be evaluated before the run",
        ),
        ({"drt_schedule": "factored@0 dense@1ep", "train_dataset": Endless()}, r"'@1ep' needs data of known length"),
    ],
    ids=["too short", "break-even", "constant LR", "zero LR", "plateau", "no length"],
)
def test_a_run_that_cannot_go_to_its_end_is_refused_before_its_first_step(tmp_path, changes, message):
    data = changes.get("train_dataset", tiny.dataset())
    args = tiny.arguments(tmp_path, **{k: v for k, v in changes.items() if k != "train_dataset"})
    trainer = DRTTrainer(tiny.llama(), args, train_dataset=data, eval_dataset=tiny.dataset())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
