"""A setting that would have no effect is refused before anything changes; the message says what would use it."""

from dataclasses import fields

import pytest
import tiny
import torch
from transformers import Trainer, TrainingArguments

from hf_drt import DRTCallback, DRTConfig, DRTTrainer, DRTTrainingArguments, DynamicRank, Plan, Run, Schedule, run
from hf_drt.cli.measurement import measured
from hf_drt.planning.idle_settings import IDLE, Usage, settings_given
from hf_drt.schedule import Phase
from hf_drt.simulate import batch_spec
from hf_drt.trainer.arguments import turn_off

# Every field: a value that differs from the default, with what is needed beside it; a schedule in which it has an
# effect; one in which it has none, and why not. None: it has an effect with any schedule.
SETTINGS = {
    "schedule": ({"schedule": "fixed"}, "fixed", None, None),
    "rank_ratio": ({"rank_ratio": 0.5}, "factored@0", "factored:4@0", r"every low-rank phase has a rank of its own"),
    "rank": ({"rank": 4}, "factored@0 dense@50%", "factored:4@0 dense@50%", r"Write a phase without one, e\.g\. low"),
    "rank_pattern": ({"rank_pattern": {"attn": 4}}, "factored@0", "dense@0", r"all are dense\. Write one .* lowrank@0"),
    "decomposition": ({"decomposition": "tucker"}, None, "fixed", r"none of the 14 target layers is one with a kernel"),
    "truncation": (
        {"truncation": "activation"},
        "dense@0 factored@50%",
        "factored@0 dense@50%",
        r"no layer loses rank after the first phase\. Write .* dense@0 factored@40%",
    ),
    "rank_multiple": (
        {"rank_multiple": 4},
        "factored:0.25@0",
        "factored:4@0",
        r"all are absolute\. Give a share, e\.g",
    ),
    "include": ({"include": ["mlp"]}, "dense@0", None, None),
    "exclude": ({"exclude": ["mlp"]}, "dense@0", None, None),
    "blocks": ({"blocks": ["LlamaDecoderLayer"]}, "dense@0", None, None),
    "ignore_source": ({"ignore_source": ["mlp"]}, None, None, None),  # the selection refuses what overrides nothing
    "budget": (
        {"budget": 0.8},
        "adaptive",
        "paper",
        r"Use the preset auto, auto_late or adaptive, or write a boundary @budget",
    ),
    "dense_query_key": ({"dense_query_key": True}, "factored@0", "adapter@0", r"only factored phases use it"),
    "dense_checkpointing": ({"dense_checkpointing": True}, "paper", "factored@0", r"only dense phases use it, and the"),
    "dense_accumulation": ({"dense_accumulation": 2}, "paper", "factored@0", r"only dense phases use it, .*dense@80%"),
    "recompute": ({"recompute": "bottleneck"}, "fixed", "dense@0", r"only factored phases use it, and there is none"),
    "group_by": (
        {"group_by": ["kind"]},
        "rotate(groups=2)",
        "paper",
        r"the schedule has no groups\. Use the preset rot",
    ),
    "frozen_dtype": (
        {"frozen_dtype": "bfloat16"},
        "rotate(groups=2)",
        "factored@0 dense@50%",
        r"only frozen and adapter phases keep weights frozen, and there is none\. Write one .* adapter@80%",
    ),
    "start": ({"start": "pretrained"}, "lowrank@0", "adapter@0", r"'lowrank' stands for, .*Write lowrank in it"),
    "adapter_alpha": (
        {"adapter_alpha": 8.0},
        "factored@0 adapter@50%",
        "factored@0",
        r"only adapter phases .*adapter@",
    ),
    "adapter_init": ({"adapter_init": "principal"}, "adapter@0", "lowrank@0", r"only adapter phases use it"),
    "moments": ({"moments": "project"}, "factored@0 factored@50%", "factored@0", r"for switches, and one phase lasts"),
    "rewarmup_steps": ({"rewarmup_steps": 2}, "adaptive", "fixed", r"for switches, and one phase lasts to the end"),
    "rewarmup_start": ({"rewarmup_start": 0.0}, None, "paper", r"there is no re-warm-up\. Set rewarmup_steps"),
    "factored_lr_scale": ({"factored_lr_scale": 2.0}, "lowrank@0", "adapter@0 dense@50%", r"only factored phases"),
    "adapter_lr_scale": ({"adapter_lr_scale": 9.0}, "paper", "paper(final=factored)", r"only adapter phases use it"),
    "left_lr_scale": ({"left_lr_scale": 4.0}, "adapter@0", "dense@0", r"only low-rank phases use it, and all are dens"),
    "right_lr_scale": ({"right_lr_scale": 0.5}, "factored@0", "dense@0", r"only low-rank phases use it, and all are d"),
    "frobenius_decay": (
        {"frobenius_decay": True},
        "fixed",
        "dense@0",
        r"only factored phases use it, and there is non",
    ),
    "matrix_optimizer": ({"matrix_optimizer": "muon"}, "dense@0", None, None),
    "matrix_lr": ({"matrix_lr": 0.1}, None, "fixed", r"own optimizer trains all weights\. Set matrix_optimizer"),
    "matrix_momentum": ({"matrix_momentum": 0.5}, None, "fixed", r"all weights\. Set matrix_optimizer, e\.g\. to"),
    "log_rank_steps": ({"log_rank_steps": 5}, "dense@0", None, None),
    "log_rank_per_layer": ({"log_rank_per_layer": True}, None, "paper", r"not logged\. Set log_rank_steps"),
    "evaluate_at_switch": ({"evaluate_at_switch": True}, "paper", "dense@0", r"Write a further phase, e\.g\. dense"),
    "save_at_switch": ({"save_at_switch": True}, "paper", "fixed", r"for switches, and one phase lasts to the end"),
    "export": ({"export": "native"}, "fixed", None, None),
    "tag_phases": ({"tag_phases": True}, None, None, None),  # needs a Hub
    "seed": ({"seed": 7}, "fixed", None, None),
}
IN_TRAINER = (
    "dense_checkpointing",
    "dense_accumulation",
    "recompute",
    "log_rank_steps",
    "log_rank_per_layer",
    "evaluate_at_switch",
    "save_at_switch",
    "export",
    "tag_phases",
)


def test_every_setting_has_taken_a_stand():
    assert set(IDLE) == set(SETTINGS) == {f.name for f in fields(DRTConfig)}


def trainer(folder, model=None, arguments=None, **settings):
    arguments = arguments or tiny.arguments(folder, drt_schedule=None)
    model = model or tiny.llama()
    return DRTTrainer(model, arguments, train_dataset=tiny.dataset(), eval_dataset=tiny.dataset(), **settings)


def prefixed(settings):
    return {f"drt_{name}": value for name, value in settings.items()}


# ---- without a schedule


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "schedule"])
def test_without_a_schedule_every_setting_is_refused(tmp_path, name):
    settings = SETTINGS[name][0]
    message = rf"{name} is .*, but there is no schedule: dynamic-rank training is off.* or leave {name} out"
    with pytest.raises(ValueError, match=message):
        DRTTrainingArguments(str(tmp_path), **prefixed(settings))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, drt=DRTConfig(**settings))
    assert DRTConfig(**settings).schedule is None  # by itself it is no run yet


def test_the_command_line_refuses_settings_without_a_schedule(capsys):
    with pytest.raises(SystemExit):
        run.read_command([__file__, "--drt_rank_ratio", "0.5", "--drt_export", "native"])
    assert "rank_ratio is 0.5, export is 'native', but there is no schedule" in capsys.readouterr().err


def test_defaults_that_are_written_out_are_no_settings(tmp_path):
    written = {f.name: f.default for f in fields(DRTConfig)} | {"adapter_alpha": 16, "dense_query_key": False}
    assert settings_given(DRTConfig(**written | {"rank_pattern": {}, "include": []})) == []
    assert trainer(tmp_path, drt=DRTConfig(**written)).drt is None


def test_arguments_can_be_turned_off(tmp_path):
    arguments = DRTTrainingArguments(str(tmp_path), report_to=[], use_cpu=True, drt_schedule="paper", drt_rank=4)
    turn_off(arguments)
    assert DRTConfig.from_prefixed(arguments) == DRTConfig()
    assert trainer(tmp_path, arguments=arguments)._drt_settings is None


# ---- with one


@pytest.mark.parametrize("name", [name for name, row in SETTINGS.items() if row[2] is not None])
def test_a_setting_that_nothing_uses_is_refused(tmp_path, name):
    settings, _, idle, reason = SETTINGS[name]
    message = rf"{name} is .*, and would have no effect: .*{reason}.* Or leave {name} out\. \(The phases are "
    model = tiny.llama()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, drt=DRTConfig(schedule=idle, **settings))
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, model, arguments=tiny.arguments(tmp_path, drt_schedule=None).__class__(
            str(tmp_path), report_to=[], use_cpu=True, drt_schedule=idle, **prefixed(settings)
        ))  # fmt: skip
    if name not in IN_TRAINER:
        with pytest.raises(ValueError, match=message):
            DynamicRank(model, DRTConfig(schedule=idle, **settings), max_steps=20)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize("name", [name for name, row in SETTINGS.items() if row[1] is not None])
def test_a_setting_that_is_used_is_not_refused(tmp_path, name):
    settings, used, _, _ = SETTINGS[name]
    trainer(tmp_path, drt=DRTConfig(**{"schedule": used} | settings))
    if name in IN_TRAINER:
        with pytest.raises(ValueError, match=rf"{name} is .* DRTTrainer uses it; a training loop of your own"):
            DynamicRank(tiny.llama(), DRTConfig(**{"schedule": used} | settings), max_steps=20)
        settings = {}
    elif "rank" not in settings and ":" not in used and used != "dense@0":
        settings = settings | {"rank": 4} if name not in ("rank_ratio", "rank_multiple") else settings
    DynamicRank(tiny.llama(), DRTConfig(**{"schedule": used} | settings), max_steps=20)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"schedule": "auto", "rank_ratio": 0.125}, r"rank_ratio is 0\.125, .* or by the budget"),
        ({"schedule": "auto", "rank": 4}, r"rank is 4, .* or by the budget"),
        ({"schedule": "auto", "adapter_lr_scale": 5.0}, r"adapter_lr_scale is 5\.0.*\(The phases are factored:"),
        ({"schedule": "auto", "moments": "project"}, r"moments is 'project', .*one phase lasts to the end"),
        ({"schedule": "auto", "frobenius_decay": True}, r"decays the product anyway\. .* preset auto brings mat"),
        ({"schedule": "auto", "left_lr_scale": 2.0}, r"left_lr_scale is .*by one rate, .* preset auto brings"),
        ({"schedule": "auto", "matrix_optimizer": "none", "matrix_lr": 0.1}, r"matrix_lr is 0\.1, .*trains all"),
        ({"schedule": "auto_late", "matrix_lr": 0.1}, r"matrix_lr is 0\.1, .*trains all weights"),
        ({"schedule": "auto", "start": "pretrained", "matrix_lr": 0.1}, r"matrix_lr is 0\.1, .*trains all weights"),
        ({"schedule": "auto", "start": "pretrained", "factored_lr_scale": 5.0}, r"factored_lr.*The phases are adapter"),
        ({"schedule": "auto", "start": "pretrained", "dense_query_key": False}, r"dense_query_key is False.*only fac"),
        ({"schedule": "decay", "rank_ratio": 0.5}, r"rank_ratio is 0\.5"),
        ({"schedule": "paper", "budget": 0.05}, r"budget is 0\.05, .* depends on a budget"),
        ({"schedule": "paper", "rank": 4, "rank_ratio": 0.125}, r"rank_ratio is 0\.125.* rank=4 takes its place"),
        ({"schedule": "paper", "rank": 4, "rank_multiple": 4}, r"rank_multiple is 4.*Give a share"),
        ({"schedule": "paper", "rank_pattern": {"": 4}, "rank": 8}, r"rank_pattern gives every target layer its rank"),
        ({"schedule": "paper", "rank_pattern": {"": 4}, "rank_multiple": 4}, r"rank_multiple is 4"),
        ({"schedule": "dense@0", "rank_multiple": 4}, r"rank_multiple is 4.*all are dense"),
        ({"schedule": "fixed", "dense_query_key": True, "include": ["mlp"]}, r"none of the 6 target layers is a query"),
        ({"schedule": "fixed", "dense_query_key": True, "rank_pattern": {"[qk]_proj": 4}}, r"none of the 14 targ"),
    ],
    ids=str,
)  # fmt: skip
def test_what_decides_is_the_whole_of_schedule_layers_and_settings(tmp_path, settings, reason):
    with pytest.raises(ValueError, match=rf"would have no effect: .*|{reason}") as refused:
        trainer(tmp_path, drt=DRTConfig(**settings))
    assert refused.match(reason)
    with pytest.raises(ValueError, match=r"would have no effect|no rank meets a budget"):
        DynamicRank(tiny.llama(), DRTConfig(**settings), max_steps=1000)


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "paper", "rank_pattern": {"attn": 0.125}, "rank": 4, "rank_multiple": 4},  # rounds the pattern's
        {"schedule": "auto", "rank_multiple": 4, "budget": 0.9},
        {"schedule": "auto", "matrix_lr": 0.1, "matrix_momentum": 0.5, "factored_lr_scale": 2.0},
        {"schedule": "auto", "matrix_optimizer": "none", "left_lr_scale": 2.0, "frobenius_decay": True},
        {"schedule": "auto", "dense_query_key": False, "matrix_optimizer": "muon"},
        {"schedule": "fixed", "matrix_optimizer": "none"},
        {"schedule": "factored:4@0 dense@30% factored@60%", "rank_ratio": 0.125},
        {"schedule": "paper", "rank_pattern": {"nothing": 4}},  # only warned of
        {"schedule": "paper", "include": ["nothing", "mlp"]},
        {"schedule": "paper", "seed": 3, "dense_query_key": False},
        {"schedule": "factored@0 dense@50%", "adapter_alpha": 16.0},
        {"schedule": "adaptive", "moments": "project", "rewarmup_steps": 2, "save_at_switch": True, "budget": 0.9},
        {"schedule": "fixed", "start": "pretrained", "adapter_lr_scale": 5.0},
        {"schedule": "dense@0", "log_rank_steps": 5, "log_rank_per_layer": True},
    ],
    ids=str,
)
def test_what_is_legitimate_is_not_refused(tmp_path, settings):
    trainer(tmp_path, drt=DRTConfig(**settings))


def test_a_decomposition_is_used_by_convolutions_with_a_kernel(tmp_path):
    config = DRTConfig(schedule="fixed", decomposition="cp", rank=4)
    DynamicRank(tiny.resnet(), config, max_steps=1)
    flat = tiny.resnet(layer_type="bottleneck")
    flat_config = DRTConfig(schedule="fixed", decomposition="cp", rank=4, exclude=[r"layer\.1\."])
    with pytest.raises(
        ValueError, match=r"decomposition is 'cp', .*none of the \d+ target layers is one with a kernel"
    ):
        DynamicRank(flat, flat_config, max_steps=1)


def test_a_plan_made_by_hand_leaves_no_use_for_budget_and_start():
    plan = Schedule.parse("factored@0 dense@50%").resolve(Run(20))
    DynamicRank(tiny.llama(), DRTConfig(rank=4), plan=plan)
    for setting in ({"budget": 0.5}, {"start": "pretrained"}, {"adapter_lr_scale": 2.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(setting))} is .*, and would have no effect"):
            DynamicRank(tiny.llama(), DRTConfig(**setting), plan=plan)
    windows = DRTConfig(rank=4, budget=0.9, rewarmup_steps=2)
    DynamicRank(
        tiny.llama(), windows, plan=Plan((Phase(0, "factored"),), 20), trigger=Schedule.parse("adaptive").trigger
    )


def test_a_callback_in_a_plain_trainer_refuses_alike(tmp_path):
    arguments = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    for settings, message in (
        ({"budget": 0.5}, r"budget is 0\.5, and would have no effect"),
        ({"export": "adapter"}, r"export=adapter, linear-pairs and tag_phases need DRTTrainer's own way"),
        ({"export": "linear-pairs"}, r"export=adapter, linear-pairs and tag_phases need DRTTrainer's own way"),
        ({"tag_phases": True}, r"export=adapter, linear-pairs and tag_phases need DRTTrainer's own way"),
    ):
        callback = DRTCallback(DRTConfig(schedule="factored@0 adapter@50%", **settings))
        with pytest.raises(ValueError, match=message):
            Trainer(tiny.llama(), arguments, train_dataset=tiny.dataset(), callbacks=[callback])


def test_a_field_of_the_table_sees_only_what_it_is_given():
    usage = Usage(DRTConfig(rank=4), None, [("factored", 4)], {"a": (8, 8)}, grows=False, in_trainer=False)
    assert IDLE["rank"](usage).startswith("every low-rank phase has a rank of its own")
    assert IDLE["moments"](usage) is not None
    assert IDLE["seed"](usage) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "auto", "start": "pretrained", "rank_multiple": 1},
        {"schedule": "auto", "budget": 0.9},
        {"schedule": "auto_late", "budget": 0.9},
        {"schedule": "fixed", "rank": 4},
    ],
    ids=str,
)
def test_phases_are_measured_without_the_settings_that_made_them(settings):
    config = DRTConfig(**settings, seed=1)
    model = tiny.llama()
    drt = DynamicRank(model, config, max_steps=1000)
    times = measured(model, batch_spec(model, 2, 8), drt.plan, config, 2, per_device_train_batch_size=2)
    assert len(times) == len(drt.plan)
