"""``python -m hf_drt.run``: its command line, the script's surroundings, and what becomes of the trainers."""

import inspect
import logging
import pickle
import sys
from dataclasses import fields

import mixed
import pytest
import tiny
from transformers import HfArgumentParser, Seq2SeqTrainer, Trainer

from hf_drt import DRTConfig, DRTTrainer, DRTTrainerMixin, run
from hf_drt.trainer.arguments import DRTFields

SCHEDULE = "factored@0 dense@4"
GIVEN = ["--drt_schedule", SCHEDULE, "--drt_rank", "4"]
# A script that trains; `{make}` is put in where the trainer is made.
TRAINS = """
import sys
import tiny
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
{before}
trainer = {make}(
    model=tiny.llama(),
    args=TrainingArguments(sys.argv[1], max_steps=6, report_to=[], save_strategy="no", dataloader_pin_memory=False),
    train_dataset=tiny.dataset(),
)
trainer.train()
print("forms:", sorted({{type(trainer.model.get_submodule(n)).__name__ for n in trainer.drt.targets}}))
print("plan:", trainer.drt.plan, "rank:", trainer.drt.config.rank)
"""


@pytest.fixture
def script(tmp_path):
    """Writes a script and gives its path."""

    def write(text: str, name: str = "script.py") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def trains(script, tmp_path):
    """Runs a script that trains, under hf_drt.run."""

    def go(make: str = "Trainer", before: str = "", given: list[str] = GIVEN) -> None:
        run.main([script(TRAINS.format(make=make, before=before)), *given, str(tmp_path / "out")])

    return go


def split(*words: str):
    return run.split_flags(HfArgumentParser(DRTFields, allow_abbrev=False), list(words))


# ---- the command line


def test_the_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        run.main(["--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "python -m hf_drt.run (script.py | -m module)" in out
    assert all(f"--drt_{f.name}" in out for f in fields(DRTConfig))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a script comes first, before any flag; got nothing"),
        (["-m"], "a module after -m comes first, before any flag; got nothing"),
        (["--drt_schedule", "paper", "script.py"], "a script comes first, before any flag; got --drt_schedule"),
        (["nowhere.py", "--drt_schedule", "paper"], "there is no file nowhere.py"),
        (["-m", "no.such.module", "--drt_schedule", "paper"], "there is no module no.such.module"),
        (["-m", "transformers.nonsense", "--drt_schedule", "paper"], "there is no module transformers.nonsense"),
        (
            [__file__, "--drt_resume", "auto"],
            "--drt_schedule is missing, e.g. --drt_schedule paper. Without DRT: python",
        ),
        ([__file__, "--drt_shedule", "paper"], "no flag --drt_shedule. Did you mean --drt_schedule or --drt_seed?"),
        ([__file__, "--drt-rank-rato=1"], "no flag --drt-rank-rato. Did you mean --drt_rank_ratio or --drt_rank?"),
        ([__file__, "--drt_sched", "paper"], "no flag --drt_sched. Did you mean --drt_schedule"),
        ([__file__, "--drt_zzzzzzzz"], "no flag --drt_zzzzzzzz. python -m hf_drt.run --help shows them all"),
        ([__file__, "--drt_schedule"], "argument --drt_schedule/--drt-schedule: expected one argument"),
        ([__file__, "--drt_schedule", "pape"], "'pape' is neither a preset"),
        ([__file__, "--drt_schedule", "paper", "--drt_rank_ratio", "4"], r"rank_ratio must be in (0, 1], got 4"),
        ([__file__, "--drt_schedule", "paper", "--drt_moments", "keep"], "invalid choice: 'keep'"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2_and_the_reason(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        run.main(words)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_the_flags_are_taken_out_and_all_else_keeps_its_order():
    own, rest = split(
        "a", "--drt_schedule", "paper", "--lr", "-1e-3", "--drt-rank=8", "b", "--drt_include", "attn", "mlp", "-v", "c"
    )
    assert own == ["--drt_schedule", "paper", "--drt-rank=8", "--drt_include", "attn", "mlp"]
    assert rest == ["a", "--lr", "-1e-3", "b", "-v", "c"]


def test_a_switch_needs_no_value_and_leaves_flags_alone():
    assert split("--drt_frobenius_decay", "--d", "1") == (["--drt_frobenius_decay"], ["--d", "1"])
    assert split("--drt_save_at_switch", "true", "x") == (["--drt_save_at_switch", "true"], ["x"])
    assert split("--drt_include=attn", "x") == (["--drt_include=attn"], ["x"])


def test_all_after_two_dashes_is_the_scripts():
    assert split("--drt_rank", "4", "--", "--drt_nonsense") == (["--drt_rank", "4"], ["--", "--drt_nonsense"])


# ---- the script's surroundings

TELLS = """
import sys
print("TELLS", __name__, sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals())
sys.exit({status})
"""


def test_a_script_sees_what_it_sees_under_python(script, capsys):
    path = script(TELLS.format(status=5))
    before = sys.argv, list(sys.path), sys.modules["__main__"]
    with pytest.raises(SystemExit) as end:
        run.main([path, "--lr", "1", *GIVEN, "file"])
    assert end.value.code == 5
    folder = path.rpartition("/")[0]
    assert capsys.readouterr().out.strip() == f"TELLS __main__ {[path, '--lr', '1', 'file']} {folder} True"
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before


def test_a_module_sees_what_it_sees_under_python(script, capsys, monkeypatch, tmp_path):
    script("", "package_of_a_test/__init__.py")
    path = script(TELLS.format(status=5), "package_of_a_test/train.py")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as end:
        run.main(["-m", "package_of_a_test.train", *GIVEN, "--lr", "1"])
    assert end.value.code == 5
    assert capsys.readouterr().out.startswith(f"TELLS __main__ {[path, '--lr', '1']}")


def test_an_error_of_the_script_is_passed_on(script):
    with pytest.raises(ZeroDivisionError):
        run.main([script("1 / 0"), *GIVEN])
    assert sys.modules["transformers"].Trainer is Trainer
    assert DRTTrainerMixin._drt_default is None


def test_an_import_error_within_a_module_is_passed_on(script, monkeypatch, tmp_path):
    script("import no_such_thing", "broken_package_of_a_test/__init__.py")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        run.main(["-m", "broken_package_of_a_test.train", *GIVEN])


@pytest.mark.parametrize("text", ["import transformers", "import sys; sys.exit()", "raise SystemExit(0)"])
def test_a_script_without_a_trainer_ends_with_an_error(script, text):
    with pytest.raises(SystemExit, match=r"made no transformers\.Trainer, so nothing of this run was dynamic-rank"):
        run.main([script(text), *GIVEN])


# ---- without flags

LOADS = "from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({folder!r})"


@pytest.mark.parametrize(
    ("native", "said"),
    [
        (True, "loaded native checkpoints, 1 in number, as LlamaForCausalLM"),
        (False, "loaded no native checkpoint: it did what it does without"),
    ],
)
def test_without_flags_a_script_may_load_models(script, tmp_path, caplog, native, said):
    model = mixed.mixed() if native else tiny.llama()
    model.save_pretrained(tmp_path / "model")
    with caplog.at_level(logging.INFO, "hf_drt.run"):
        run.main([script(LOADS.format(folder=str(tmp_path / "model")))])
    assert said in caplog.text


def test_flags_that_nothing_took_up_are_an_error_where_a_native_checkpoint_was_loaded_too(script, tmp_path):
    mixed.mixed().save_pretrained(tmp_path / "native")
    path = script(LOADS.format(folder=str(tmp_path / "native")))
    with pytest.raises(SystemExit, match=r"only loads native checkpoints runs without --drt_ flags"):
        run.main([path, *GIVEN])


@pytest.mark.parametrize("make", ["Trainer", "Seq2SeqTrainer"])
def test_without_flags_a_trainer_ends_the_run_as_it_is_made(trains, capsys, make):
    before = "from transformers import Seq2SeqTrainingArguments as TrainingArguments" if "2" in make else ""
    with pytest.raises(SystemExit, match=r"--drt_schedule is missing, e\.g\. .* Without DRT: python .*script\.py"):
        trains(make, before, given=[])
    assert "forms:" not in capsys.readouterr().out
    assert sys.modules["transformers"].Trainer is Trainer


def test_without_flags_a_trainer_of_ours_has_the_settings_of_the_script(trains, capsys):
    trains("DRTTrainer", OWN_ARGUMENTS + "DRTTrainingArguments(*a, drt_schedule='factored:4@0', **k)", given=[])
    assert "plan: factored:4@0" in capsys.readouterr().out


@pytest.mark.parametrize("given", [GIVEN, []])
def test_a_scripts_own_help_is_no_error(script, given, capsys):
    path = script("import argparse; argparse.ArgumentParser(description='my script').parse_args()")
    with pytest.raises(SystemExit) as end:
        run.main([path, *given, "--help"])
    assert end.value.code == 0
    assert "my script" in capsys.readouterr().out


# ---- the trainers


@pytest.mark.parametrize(
    ("make", "before"),
    [
        ("Trainer", ""),
        ("Seq2SeqTrainer", "from transformers import Seq2SeqTrainingArguments as TrainingArguments"),
        ("Mine", "class Mine(Trainer): pass"),
        ("m.Trainer", "import transformers.trainer as m"),
        ("m.Trainer", "import transformers as m"),
        ("S", "from transformers.trainer_seq2seq import Seq2SeqTrainer as S, Trainer\n"
              "from transformers import Seq2SeqTrainingArguments as TrainingArguments"),
        ("DRTTrainer", "from hf_drt import DRTTrainer"),
    ],
)  # fmt: skip
def test_every_trainer_trains_with_the_given_settings(trains, capsys, make, before):
    trains(make, before)
    out = capsys.readouterr().out
    assert "forms: ['Linear']" in out
    assert f"plan: {SCHEDULE} rank: 4" in out


def test_without_the_given_settings_the_same_script_is_plain(trains):
    with pytest.raises(AttributeError, match="'Trainer' object has no attribute 'drt'"):
        trains("m.Original", "import transformers.trainer as m; m.Original = m.Trainer.__mro__[-2]")


OWN_ARGUMENTS = "from hf_drt import DRTTrainer, DRTTrainingArguments\nTrainingArguments = lambda *a, **k: "


@pytest.mark.parametrize(
    ("make", "before"),
    [
        ("(lambda **k: DRTTrainer(drt='paper', **k))", "from hf_drt import DRTTrainer"),
        ("DRTTrainer", OWN_ARGUMENTS + "DRTTrainingArguments(*a, drt_schedule='paper', **k)"),
        ("Trainer", OWN_ARGUMENTS + "DRTTrainingArguments(*a, drt_schedule='fixed', drt_rank=2, **k)"),
    ],
)
def test_settings_in_the_script_and_on_the_command_line_are_an_error(trains, make, before):
    with pytest.raises(ValueError, match=r"settings of its own \(schedule=.*\), and hf_drt.run was given others"):
        trains(make, before)


def test_a_script_that_mixes_the_mixin_in_itself_is_told_why_it_fails(trains):
    with pytest.raises(TypeError, match="MRO") as failure:
        trains("Mine", "from hf_drt import DRTTrainerMixin\nclass Mine(DRTTrainerMixin, Trainer): pass")
    assert any("Run a script that uses it itself without hf_drt.run" in note for note in failure.value.__notes__)


def test_other_type_errors_get_no_note(script):
    with pytest.raises(TypeError) as failure:
        run.main([script("len(1)"), *GIVEN])
    assert not hasattr(failure.value, "__notes__")


def test_the_stand_ins_pass_for_the_originals():
    top = sys.modules["transformers"]
    modules = [top, *(sys.modules[f"transformers.{name}"] for name in ("trainer", "trainer_seq2seq"))]
    before = [(module.Trainer, getattr(module, "Seq2SeqTrainer", None)) for module in modules]
    with run.dynamic_rank_trainers(DRTConfig(schedule=SCHEDULE)):
        for new, old in ((top.Trainer, Trainer), (top.Seq2SeqTrainer, Seq2SeqTrainer)):
            assert new is not old
            assert getattr(sys.modules[old.__module__], old.__name__) is new
            assert issubclass(new, old)
            assert issubclass(new, DRTTrainerMixin)
            assert issubclass(new, top.Trainer)
            assert (new.__name__, new.__module__, new.__doc__) == (old.__name__, old.__module__, old.__doc__)
            assert inspect.signature(new) == inspect.signature(old)
            assert pickle.loads(pickle.dumps(new)) is new
    assert before == [(module.Trainer, getattr(module, "Seq2SeqTrainer", None)) for module in modules]


def test_settings_end_with_the_run():
    with run.dynamic_rank_trainers(DRTConfig(schedule=SCHEDULE)) as flags:
        assert DRTTrainerMixin._drt_default is flags
        assert not flags.taken
    assert DRTTrainer._drt_default is None
    assert not logging.getLogger("hf_drt").handlers
