"""What is refused under DeepSpeed, by its configuration and by ours; DeepSpeed itself is not needed."""

import re
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers.trainer_utils import HubStrategy

from hf_drt import DRTCallback, DRTConfig
from hf_drt.trainer.zero import faults

GATHERS = {"stage3_gather_16bit_weights_on_model_save": True}


def fake(zero: dict, args: dict | None = None, given: dict | None = None, optimizer=None):
    """A trainer as far as the check looks at it."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": zero, **(given or {})})
    arguments = {
        "load_best_model_at_end": False, "torch_compile": False, "push_to_hub": False, "auto_find_batch_size": False,
        "hub_strategy": HubStrategy.EVERY_SAVE,
    } | (args or {})  # fmt: skip
    return SimpleNamespace(
        is_deepspeed_enabled=True,
        accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)),
        args=SimpleNamespace(**arguments),
        model=None,
        optimizer=optimizer,
        optimizer_cls_and_kwargs=None,
        get_optimizer_cls_and_kwargs=lambda args, model: (torch.optim.AdamW, {}),
    )


def said(trainer, **settings) -> list[str]:
    return list(faults(trainer, DRTConfig(schedule="factored@0 dense@50%", **settings)))


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 2}, {"stage": 3, **GATHERS}], ids=str)
def test_the_three_stages_are_allowed(zero):
    assert said(fake(zero)) == []
    assert said(fake(zero | {"offload_optimizer": {"device": "cpu"}})) == []


@pytest.mark.parametrize(
    ("zero", "given", "message"),
    [
        ({}, {}, "DeepSpeed with zero_optimization.stage=0. Set it to 1, 2 or 3"),
        (
            {"stage": 2},
            {"optimizer": {"type": "AdamW"}},
            "'optimizer' in DeepSpeed's configuration. Take it out: .* --optim",
        ),
        ({"stage": 2}, {"scheduler": {"type": "WarmupLR"}}, "'scheduler' in DeepSpeed's .* by --lr_scheduler_type"),
        ({"stage": 3}, {}, "ZeRO-3 that saves no model. Set zero_optimization.stage3_gather_16bit"),
        ({"stage": 3, **GATHERS, "offload_param": {"device": "nvme"}}, {}, "offload_param.device=nvme. Set it to cpu"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, {}, "offload_optimizer.device=nvme. Set it to cpu"),
        ({"stage": 3, **GATHERS, "zero_hpz_partition_size": 2}, {}, "zero_hpz_partition_size=2. Leave it out"),
        ({"stage": 3, **GATHERS, "mics_shard_size": 2}, {}, "mics_shard_size=2. Leave it out"),
        ({"stage": 3, **GATHERS, "zero_quantized_weights": True}, {}, "zero_quantized_weights. Leave it out"),
        ({"stage": 1}, {"tensor_parallel": {"autotp_size": 2}}, "autotp_size=2 of DeepSpeed. Leave it out"),
        ({"stage": 1}, {"data_types": {"grad_accum_dtype": "fp32"}}, "grad_accum_dtype=fp32 with ZeRO-1.*stage to 2"),
        ({"stage": 2}, {"hybrid_engine": {"enabled": True}}, "DeepSpeed's hybrid_engine. Leave it out"),
    ],
    ids=str,
)
def test_what_deepspeeds_configuration_cannot_have(zero, given, message):
    (fault,) = said(fake(zero, given=given))
    assert re.search(message, fault)


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        ({"load_best_model_at_end": True}, {}, "load_best_model_at_end under DeepSpeed. Leave it out"),
        ({"torch_compile": True}, {}, "torch_compile under DeepSpeed"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size under DeepSpeed"),
        ({"push_to_hub": True}, {}, "hub_strategy=every_save under DeepSpeed"),
        ({}, {"export": "adapter"}, "drt_export=adapter under DeepSpeed"),
        ({}, {"frobenius_decay": True}, "drt_frobenius_decay under DeepSpeed"),
        ({}, {"frozen_dtype": "bfloat16"}, "drt_frozen_dtype under DeepSpeed"),
        ({}, {"truncation": "activation"}, "drt_truncation=activation under Deep"),
        ({}, {"dense_accumulation": 2}, "drt_dense_accumulation under DeepSpeed"),
        ({}, {"matrix_optimizer": "muon"}, "the matrix optimizer under DeepSpeed.* Set drt_matrix_optimizer=none"),
    ],
    ids=str,
)
def test_what_settings_do_not_go_with_it(args, settings, message):
    assert re.search(message, said(fake({"stage": 2}, args), **settings)[0])


def test_an_optimizer_whose_step_is_not_element_by_element():
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))])
    (fault,) = said(fake({"stage": 2}, optimizer=optimizer))
    assert fault == "Adagrad under DeepSpeed: of the optimizers AdamW, Adam, SGD, RMSprop are. Set optim=adamw_torch"


def test_the_callback_alone_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    arguments = tiny.arguments(tmp_path)
    with pytest.raises(ValueError, match="DRTCallback cannot make DeepSpeed's engine anew after a change of form"):
        DRTCallback(DRTConfig(schedule="factored@0 dense@50%"))._check(arguments, tiny.llama())
