"""The drt_* training arguments: DRTConfig's fields on a command line, in JSON and in a pickle."""

import io
import json
from dataclasses import MISSING, fields

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_drt import DRTConfig, DRTSeq2SeqTrainingArguments, DRTTrainingArguments

CLASSES = [DRTTrainingArguments, DRTSeq2SeqTrainingArguments]
classes = pytest.mark.parametrize("cls", CLASSES)

# Every field: what a user types, and the value it stands for; each other than the default.
FLAGS = {
    "schedule": (["factored@0 dense@40% adapter@80%"], "factored@0 dense@40% adapter@80%"),
    "rank_ratio": (["0.125"], 0.125),
    "rank": (["16"], 16),
    "rank_pattern": (['{"attn": 0.125, "mlp": 64}'], '{"attn": 0.125, "mlp": 64}'),
    "decomposition": (["tucker"], "tucker"),
    "truncation": (["activation"], "activation"),
    "rank_multiple": (["4"], 4),
    "include": (["attn", r"mlp\.(up|down)"], ["attn", r"mlp\.(up|down)"]),
    "exclude": (["layers\\.0"], ["layers\\.0"]),
    "blocks": (["LlamaDecoderLayer", r"layers\.\d"], ["LlamaDecoderLayer", r"layers\.\d"]),
    "ignore_source": (["to_q"], ["to_q"]),
    "dense_checkpointing": ([], True),
    "dense_accumulation": (["4"], 4),
    "recompute": (["bottleneck"], "bottleneck"),
    "start": (["pretrained"], "pretrained"),
    "budget": (["0.5"], 0.5),
    "dense_query_key": (["False"], False),
    "group_by": (["attn", "mlp"], ["attn", "mlp"]),
    "frozen_dtype": (["bfloat16"], "bfloat16"),
    "adapter_alpha": (["32"], 32.0),
    "adapter_init": (["principal"], "principal"),
    "moments": (["reset"], "reset"),
    "rewarmup_steps": (["50"], 50),
    "rewarmup_start": (["0.2"], 0.2),
    "factored_lr_scale": (["2.5"], 2.5),
    "adapter_lr_scale": (["0.5"], 0.5),
    "left_lr_scale": (["4"], 4.0),
    "right_lr_scale": (["0.25"], 0.25),
    "matrix_optimizer": (["muon"], "muon"),
    "matrix_lr": (["0.05"], 0.05),
    "matrix_momentum": (["0.95"], 0.95),
    "frobenius_decay": (["True"], True),
    "log_rank_steps": (["100"], 100),
    "log_rank_per_layer": ([], True),
    "evaluate_at_switch": (["True"], True),
    "save_at_switch": (["True"], True),
    "export": (["native"], "native"),
    "tag_phases": (["True"], True),
    "seed": (["7"], 7),
}
EXPECTED = {f"drt_{name}": value for name, (_, value) in FLAGS.items()}


def parse(cls: type, *flags: str):
    return HfArgumentParser(cls).parse_args_into_dataclasses(["--output_dir", "out", *flags])[0]


def drt_values(args) -> dict:
    return {f.name: getattr(args, f.name) for f in fields(args) if f.name.startswith("drt_")}


@pytest.fixture(params=CLASSES)
def full(request, tmp_path):
    """Arguments with every field set, made in Python."""
    return request.param(str(tmp_path), **EXPECTED)


# ---- the fields


def test_the_table_of_flags_has_every_field():
    assert set(FLAGS) == {f.name for f in fields(DRTConfig)}


@classes
def test_every_setting_is_an_argument_and_every_argument_a_setting(cls):
    base = Seq2SeqTrainingArguments if cls is DRTSeq2SeqTrainingArguments else TrainingArguments
    added = {f.name for f in fields(cls)} - {f.name for f in fields(base)}
    assert added == {f"drt_{f.name}" for f in fields(DRTConfig)}


@classes
@pytest.mark.parametrize("setting", fields(DRTConfig), ids=lambda f: f.name)
def test_an_argument_has_the_default_and_the_help_of_its_setting(cls, setting):
    argument = cls.__dataclass_fields__[f"drt_{setting.name}"]
    assert setting.default is not MISSING
    assert argument.default == setting.default
    assert argument.metadata["help"] == setting.metadata["help"]
    assert len(argument.metadata["help"]) > 20
    assert argument.metadata["help"].endswith(".")


@classes
def test_unset_means_plain_training(cls, tmp_path):
    args = cls(str(tmp_path))
    assert args.drt_schedule is None
    assert DRTConfig.from_prefixed(args) == DRTConfig()


@classes
def test_the_first_positional_argument_is_still_the_output_folder(cls):
    assert cls("somewhere").output_dir == "somewhere"
    assert next(iter(f.name for f in fields(cls))) == "output_dir"


@classes
def test_the_arguments_are_training_arguments(cls):
    assert issubclass(cls, TrainingArguments)
    assert issubclass(cls, Seq2SeqTrainingArguments) == (cls is DRTSeq2SeqTrainingArguments)


# ---- a command line


@classes
@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_sets_its_field_and_no_other(cls, name):
    words, value = FLAGS[name]
    schedule = () if name == "schedule" else ("--drt_schedule", "paper")  # without one a setting is refused
    args = parse(cls, *schedule, f"--drt_{name}", *words)
    found = drt_values(args)
    assert found.pop(f"drt_{name}") == value
    defaults = drt_values(parse(cls, *schedule))
    del defaults[f"drt_{name}"]
    assert found == defaults


@classes
def test_all_flags_together_make_the_config(cls):
    args = parse(cls, *[word for name, (words, _) in FLAGS.items() for word in (f"--drt_{name}", *words)])
    assert drt_values(args) == EXPECTED
    config = DRTConfig.from_prefixed(args)
    assert config.rank_pattern == {"attn": 0.125, "mlp": 64}
    assert config == DRTConfig(**{name: value for name, (_, value) in FLAGS.items()})


@classes
def test_dashes_may_stand_for_underscores(cls):
    assert parse(cls, "--drt-schedule", "paper", "--drt-rank-ratio", "0.5").drt_rank_ratio == 0.5


@classes
@pytest.mark.parametrize("name", ["start", "adapter_init", "moments", "export", "decomposition"])
def test_the_command_line_refuses_a_word_that_is_no_choice(cls, name, capsys):
    with pytest.raises(SystemExit):
        parse(cls, f"--drt_{name}", "nonsense")
    assert f"--drt_{name}" in capsys.readouterr().err


@classes
def test_the_command_line_refuses_a_value_outside_its_interval(cls):
    with pytest.raises(ValueError, match=r"rank_ratio must be in \(0, 1\], got 4"):
        parse(cls, "--drt_rank_ratio", "4")


@classes
def test_the_help_shows_every_flag_and_percent_signs_once(cls):
    text = " ".join(HfArgumentParser(cls).format_help().split())
    assert all(f"--drt_{name}" in text for name in FLAGS)
    assert "factored@0 dense@40% adapter@80%" in text
    assert "%%" not in text


# ---- JSON and pickle


def test_arguments_survive_json(full):
    stored = json.loads(full.to_json_string())
    assert drt_values(full) == {key: value for key, value in stored.items() if key.startswith("drt_")}


def test_arguments_survive_a_json_file(full, tmp_path):
    file = tmp_path / "args.json"
    file.write_text(json.dumps({"output_dir": str(tmp_path), **EXPECTED}))
    (read,) = HfArgumentParser(type(full)).parse_json_file(file)
    assert drt_values(read) == drt_values(full)


def test_arguments_survive_a_dict(full):
    (read,) = HfArgumentParser(type(full)).parse_dict(full.to_dict(), allow_extra_keys=True)
    assert drt_values(read) == drt_values(full)


def test_a_rank_pattern_may_be_a_dict_and_survives_json(tmp_path):
    args = DRTTrainingArguments(str(tmp_path), drt_schedule="fixed", drt_rank_pattern={"attn": 0.125, "mlp": 64})
    stored = json.loads(args.to_json_string())["drt_rank_pattern"]
    assert DRTConfig(schedule="fixed", rank_pattern=stored) == DRTConfig.from_prefixed(args)
    # 64 is a rank and 64.0 would be no share: the types survive too.
    assert [type(rank) for rank in stored.values()] == [float, int]


def test_arguments_survive_a_pickle(full):
    buffer = io.BytesIO()
    torch.save(full, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    assert type(read) is type(full)
    assert read.to_dict() == full.to_dict()


def test_arguments_show_their_settings(full):
    assert "drt_schedule='factored@0 dense@40% adapter@80%'" in repr(full)
    assert full.to_sanitized_dict()["drt_rank_ratio"] == 0.125


# ---- from_prefixed


def test_a_config_is_read_from_any_object_with_prefixed_attributes():
    class Source:
        my_schedule = "fixed"
        my_rank = 4
        rank_ratio = 0.9

    assert DRTConfig.from_prefixed(Source(), "my_") == DRTConfig(schedule="fixed", rank=4)
    assert DRTConfig.from_prefixed(Source(), "my_", rank=8).rank == 8
