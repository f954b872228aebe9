"""A preset is one entry of a registry: help, errors, tables and the settings of a run follow from it."""

import copy
import pickle

import pytest
import tiny
from transformers import HfArgumentParser

from hf_drt import Dense, DRTConfig, DRTTrainer, DRTTrainingArguments, DynamicRank, run
from hf_drt.planning.idle_settings import settings_given
from hf_drt.schedule import PRESETS, Follows, Preset, Schedule, preset_rows, register


def build(share: float) -> str:
    return f"lowrank@0 dense@50% adapter:{share}@75%"


TOY = Preset(
    "toy",
    "Low rank, full rank in the 3rd quarter (75 % of the run), an adapter.",
    build,
    {"share": 0.25},
    {
        "adapter_alpha": Follows("decomposition", {"svd": 3.0, "cp": 5.0}),
        "rank": 4,
        "dense_query_key": True,
        "seed": 11,
    },
)


@pytest.fixture(autouse=True)
def toy():
    register(TOY)
    yield
    PRESETS.remove("toy")


def test_it_is_in_the_help_of_the_arguments(capsys):
    text = HfArgumentParser(DRTTrainingArguments).format_help()
    assert " ".join(f"toy(share=0.25): {TOY.help}".split()) in " ".join(text.split())
    with pytest.raises(SystemExit):
        run.read_command(["--help"])
    assert "toy(share=0.25)" in capsys.readouterr().out


def test_it_is_in_the_errors():
    with pytest.raises(ValueError, match=r"'tyo' is neither a preset \(paper, .*, toy\) nor a phase"):
        Schedule.parse("tyo")
    with pytest.raises(ValueError, match=r"preset 'toy' has no option 'shares'; its options are: share\."):
        Schedule.parse("toy(shares=1)")
    with pytest.raises(ValueError, match=r"option 'share' of preset 'toy' must be like 0\.25, got 'much'"):
        DRTConfig(schedule="toy(share=much)")


def test_it_is_in_the_table_of_the_documentation():
    assert preset_rows()[-1] == (
        "toy(share=0.25)", TOY.help, "adapter_alpha 3, 5 by decomposition, rank 4, dense_query_key True, seed 11"
    )  # fmt: skip
    assert len(preset_rows()) == len(PRESETS)


def test_a_run_has_its_settings(tmp_path):
    trainer = tiny.trainer(tmp_path, drt_schedule="toy", max_steps=8, drt_rank_multiple=1)
    trainer.train()
    drt = trainer.drt
    assert [(p.start, p.kind) for p in drt.plan.phases] == [(0, "factored"), (4, "dense"), (6, "adapter")]
    first, last = drt.forms(0), drt.forms(2)
    assert {form.rank for form in first.values() if form != Dense()} == {4}
    assert {name.rpartition(".")[2] for name, form in first.items() if form == Dense()} == {"q_proj", "k_proj"}
    assert {(form.rank, form.alpha) for form in last.values()} == {(8, 3.0)}
    assert drt.seed == 11
    assert {row["drt_phase"] for row in trainer.state.log_history if "drt_phase" in row} == {0, 1, 2}


def test_what_the_user_sets_goes_before():
    config = DRTConfig(schedule="toy", rank=8, adapter_alpha=7.0, dense_query_key=False, seed=0)
    assert (config.rank, config.adapter_alpha, config.keeps_query_key, config.seed) == (8, 7.0, False, 0)
    assert DRTConfig(schedule="toy", decomposition="cp").adapter_alpha == 5.0
    assert DRTConfig(schedule="toy", decomposition="tucker").adapter_alpha == 16.0  # it says nothing of it


def test_what_it_brings_is_no_setting_of_the_user():
    assert settings_given(DRTConfig(schedule="toy", decomposition="cp")) == ["decomposition"]
    assert settings_given(DRTConfig(schedule="toy", rank=8, seed=11)) == ["rank"]
    DynamicRank(tiny.llama(), "toy(share=0.125)", max_steps=8)


def test_a_setting_that_is_never_unset_cannot_be_brought():
    register(Preset("other", "Low rank.", lambda: "lowrank@0", settings={"rank_ratio": 0.5}))
    try:
        with pytest.raises(
            ValueError, match=r"preset 'other' brings rank_ratio=0\.5, .* can be left unset: rank, rank_"
        ):
            DRTConfig(schedule="other")
    finally:
        PRESETS.remove("other")


@pytest.mark.parametrize("name", ["two words", ""])
def test_a_name_is_a_word(name):
    with pytest.raises(ValueError, match=rf"a preset needs a name of letters, digits and underscores, got '{name}'\."):
        register(Preset(name, "Nothing.", lambda: "lowrank@0"))


@pytest.mark.parametrize("name", ["paper", "toy"])
def test_a_name_that_is_taken_is_refused(name):
    with pytest.raises(ValueError, match=rf"preset '{name}' is registered already, for .*names in use are paper, "):
        register(Preset(name, "Nothing.", lambda: "lowrank@0"))


def test_a_trainer_refuses_the_unknown(tmp_path):
    with pytest.raises(ValueError, match=r"'tyo' is neither a preset"):
        DRTTrainer(tiny.llama(), tiny.arguments(tmp_path, drt_schedule=None), drt="tyo")


def test_settings_with_a_preset_that_cannot_be_pickled_can_be_copied_and_pickled():
    register(Preset("local", "of functions made on the spot", lambda: "factored@0"))
    try:
        config = DRTConfig(schedule="local")
        assert config.parsed is not None
        for copied in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert copied == config
            assert str(copied.parsed) == str(config.parsed)
    finally:
        PRESETS.remove("local")


def test_a_share_in_a_help_text_does_not_stop_the_parser(capsys):
    register(Preset("half", "50 % of %s", lambda: "factored@0"))
    try:
        with pytest.raises(SystemExit):
            HfArgumentParser(DRTTrainingArguments).parse_args_into_dataclasses(["--help"])
        assert "50 % of %s" in " ".join(capsys.readouterr().out.split())
    finally:
        PRESETS.remove("half")


def test_an_option_that_is_true_can_be_turned_off():
    register(Preset("switched", "low rank or not", lambda low: "factored@0" if low else "dense@0", {"low": True}))
    try:
        assert str(Schedule.parse("switched(low=False)").entries[0]) == "dense@0"
        assert str(Schedule.parse("switched(low=true)").entries[0]) == "factored@0"
        with pytest.raises(ValueError, match=r"option 'low' of preset 'switched' must be true or false, got 'no'"):
            Schedule.parse("switched(low=no)")
    finally:
        PRESETS.remove("switched")


def test_a_default_that_tells_no_type_is_refused():
    with pytest.raises(ValueError, match=r"option 'x' of preset 'none' needs a default that is a number, .* got None"):
        register(Preset("none", "nothing", lambda x: "dense@0", {"x": None}))
    assert "none" not in PRESETS


@pytest.mark.parametrize("steps", [4, 5, 6, 8, 9])
def test_auto_late_fits_runs_of_a_few_steps(steps):
    controller = DynamicRank(tiny.llama(), "auto_late", max_steps=steps)
    assert [phase.kind for phase in controller.plan.phases] == ["factored", "dense"]
    assert controller.plan.phases[1].start == steps - 1
