"""At the start of training the resolved plan is printed once, with what has decided it."""

import logging

import pytest
import tiny
from transformers import Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_drt import DRTCallback, DRTConfig


def trained(folder, capsys, schedule, max_steps=2, **changes):
    trainer = tiny.trainer(
        folder,
        drt_schedule=schedule,
        **{"max_steps": max_steps, "disable_tqdm": False, "drt_rank_multiple": 1} | changes,
    )
    trainer.train()
    return trainer, capsys.readouterr().out


def test_auto_says_what_it_has_chosen(tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, logger="hf_drt"):
        trainer, out = trained(tmp_path, capsys, "auto", max_steps=20, drt_budget=0.3, drt_matrix_lr=0.02)
    (form,) = set(trainer.drt.forms(0).values())
    share = trainer.drt.plan.phases[0].rank
    lines = out.splitlines()
    assert lines[0].startswith("dynamic-rank plan: auto = lowrank:budget@0 -> factored:")
    rank = f"rank: factored {form.rank} ({share:g} of min(out, in) by the budget of 0.3)"
    rule = "matrix_optimizer: muon (by the preset auto) at matrix_lr=0.02"
    assert lines.count(f"  {rank}") == 1
    assert lines.count("  dense_query_key: False (by the preset auto)") == 1
    assert [line.startswith(f"  {rule}, whose update of T tokens costs") for line in lines].count(True) == 1
    assert [f"{lines[0]}; {rank}; {rule}"] == [r.message for r in caplog.records if "dynamic-rank plan" in r.message]


def test_what_the_user_sets_is_not_laid_to_the_preset(tmp_path, capsys):
    settings = {"drt_matrix_optimizer": "muon", "drt_dense_query_key": True, "drt_budget": 0.5}
    out = trained(tmp_path, capsys, "auto", **settings)[1]
    assert "matrix_optimizer: muon at matrix_lr=0.04, whose update" in out
    assert "dense_query_key: 4 query and key projections stay dense" in out
    assert "by the preset" not in out
    assert "matrix_optimizer" not in trained(tmp_path, capsys, "auto", drt_matrix_optimizer="none")[1]


def test_auto_late_says_what_it_has_chosen(tmp_path, capsys):
    trainer, out = trained(tmp_path, capsys, "auto_late", max_steps=20, drt_budget=0.5)
    plan, lines = trainer.drt.plan, out.splitlines()
    ranks = {form.rank for form in trainer.drt.forms(0).values() if hasattr(form, "rank")}
    start, share = plan.phases[1].start, plan.phases[0].rank
    cost = trainer.drt.cost()
    assert (
        lines[0]
        == f"dynamic-rank plan: auto_late = lowrank:budget@0 dense@budget -> {plan} (of 20 update steps) on 14 layers"
    )
    for line in (
        "  lowrank: factored form (by where the weights come from)",
        f"  boundary: dense from step {start} on (by the budget of 0.5)",
        f"  rank: factored {min(ranks)} ({share:g} of min(out, in) by the budget of 0.5)",
        "  dense_query_key: 4 query and key projections stay dense in factored phases",
        f"  cost, of the target layers alone: {cost.flops:.3f} of their dense training FLOPs, {cost.parameters:.3f} of "
        "their trainable parameters",
    ):
        assert lines.count(line) == 1
    assert "  . factored  # dense" in lines


@pytest.mark.parametrize(
    ("schedule", "settings", "line"),
    [
        ("paper_conv(ratio=0.25)", {"drt_start": "pretrained"}, "adapter_alpha: 16.0 (by the preset paper_conv)"),
        ("paper_conv(ratio=0.25)", {"drt_start": "pretrained"}, "lowrank: adapter form (start=pretrained)"),
        ("factored:4@0", {"drt_rank_multiple": 8}, "rank: factored 4 (factored:4 in the schedule)"),
        ("factored@0", {"drt_rank": 3, "drt_rank_multiple": 8}, "rank: factored 3 (rank=3)"),
        ("factored@0", {}, "rank: factored 8 (rank_ratio=0.25)"),
        ("factored@0", {"drt_rank_pattern": '{"mlp": 5}'}, "factored 5 to 8 (rank_pattern, else rank_ratio=0.25)"),
        ("adaptive", {"drt_rank": 3, "drt_rank_multiple": 8}, "asks for it (within the budget of 0.4)"),
    ],
)  # fmt: skip
def test_everything_says_what_has_decided_it(tmp_path, capsys, schedule, settings, line):
    assert line in trained(tmp_path, capsys, schedule, max_steps=5, **settings)[1]


def test_what_the_user_has_set_is_not_the_presets(tmp_path, capsys):
    settings = {"drt_start": "pretrained", "drt_adapter_alpha": 3.0}
    assert "by the preset" not in trained(tmp_path, capsys, "paper_conv(ratio=0.25)", max_steps=5, **settings)[1]


def test_it_is_said_once_in_every_run(tmp_path, capsys):
    trainer, out = trained(tmp_path, capsys, "factored@0 dense@1 factored@2", max_steps=3)
    assert out.count("dynamic-rank plan") == 1
    trainer.train()
    assert capsys.readouterr().out.count("dynamic-rank plan") == 1


def test_a_callback_in_a_plain_trainer_says_it_too(tmp_path, capsys):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=2)
    callback = DRTCallback(DRTConfig(schedule="factored@0", rank=4))
    Trainer(tiny.llama(), args, train_dataset=tiny.dataset(), callbacks=[callback]).train()
    assert capsys.readouterr().out.count("dynamic-rank plan: factored@0 (of 2 update steps) on 14 layers") == 1


@pytest.mark.parametrize("changes", [{"disable_tqdm": True}, {"log_level": "error"}], ids=str)
def test_it_is_silent_where_silence_is_asked_for(tmp_path, capsys, changes):
    before = transformers_logging.get_verbosity()
    try:
        assert "dynamic-rank plan" not in trained(tmp_path, capsys, "factored@0", **changes)[1]
    finally:
        transformers_logging.set_verbosity(before)


def test_the_log_has_it_at_level_info(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_drt"):
        tiny.trainer(tmp_path, drt_schedule="factored@0", max_steps=1).train()
    assert sum("dynamic-rank plan: factored@0 (of 1 update steps)" in record.message for record in caplog.records) == 1


def test_another_process_says_nothing(tmp_path, capsys):
    trainer = tiny.trainer(tmp_path, drt_schedule="factored@0", max_steps=1, disable_tqdm=False)
    trainer.train()
    capsys.readouterr()
    trainer.state.is_world_process_zero = False
    trainer._drt_driver.train_begins(trainer.args, trainer.state)
    assert "dynamic-rank plan" not in capsys.readouterr().out
