"""Settings outside of their interval are refused where they are given, with what is allowed."""

import math

import pytest

from hf_drt import (
    DRTConfig,
    DRTTrainingArguments,
)

FIELDS = [
    ("schedule", "", r"schedule must be a non-empty text, got ''"),
    ("schedule", "  \n", r"schedule must be a non-empty text, got "),
    ("schedule", 40, r"schedule must be a non-empty text, got 40"),
    ("rank_ratio", 0, r"rank_ratio must be in \(0, 1\], got 0\. It is a share of min\(out, in\); .* use rank="),
    ("rank_ratio", -0.5, r"rank_ratio must be in \(0, 1\], got -0\.5"),
    ("rank_ratio", 4, r"rank_ratio must be in \(0, 1\], got 4\. .* for an absolute rank use rank="),
    ("rank_ratio", math.nan, r"rank_ratio must be in \(0, 1\], got nan"),
    ("rank_ratio", "0.5", r"rank_ratio must be in \(0, 1\], got '0\.5'"),
    ("rank_ratio", True, r"rank_ratio must be in \(0, 1\], got True"),
    ("rank_ratio", None, r"rank_ratio must be in \(0, 1\], got None"),
    ("rank", 0, r"rank must be a whole number of at least 1, got 0"),
    ("rank", 8.0, r"rank must be a whole number of at least 1, got 8\.0"),
    ("rank", True, r"rank must be a whole number of at least 1, got True"),
    ("rank", "8", r"rank must be a whole number of at least 1, got '8'"),
    (
        "rank_pattern",
        "{attn: 4}",
        r"rank_pattern is not valid JSON \(.*\): '{attn: 4}'\. Write it as '{\"attn\": 0\.125",
    ),
    ("rank_pattern", "", r"rank_pattern is not valid JSON"),
    ("rank_pattern", "[4]", r"rank_pattern must map regular expressions to ranks, got \[4\]"),
    ("rank_pattern", 4, r"rank_pattern must map regular expressions to ranks, got 4"),
    ("rank_pattern", '{"(": 4}', r"rank_pattern holds '\(', which is not a regular expression: .* backslash"),
    ("rank_pattern", {"attn": 0}, r"rank_pattern gives 0 for 'attn'; allowed is a whole number of at least 1"),
    ("rank_pattern", {"attn": 1.5}, r"rank_pattern gives 1\.5 for 'attn'; .* in \(0, 1\]"),
    ("rank_pattern", {"attn": True}, r"rank_pattern gives True for 'attn'"),
    ("rank_pattern", {"attn": "4"}, r"rank_pattern gives '4' for 'attn'"),
    ("rank_pattern", '{"attn": NaN}', r"rank_pattern gives nan for 'attn'"),
    ("rank_pattern", {5: 4}, r"rank_pattern.*5"),
    ("decomposition", ["svd"], r"decomposition must be one of svd, tucker, cp, got \['svd'\]"),
    ("decomposition", "qr", r"decomposition must be one of svd, tucker, cp, got 'qr'"),
    ("rank_multiple", 0, r"rank_multiple must be .*at least 1, got 0"),
    ("rank_multiple", 8.0, r"rank_multiple must be a whole number of at least 1, got 8\.0"),
    ("rank_multiple", True, r"rank_multiple must be a whole number of at least 1, got True"),
    ("include", "attn", r"include must be a list of regular expressions, got 'attn'"),
    ("include", [5], r"include must be a list of regular expressions, got \[5\]"),
    ("include", 5, r"include must be a list of regular expressions, got 5"),
    ("include", ["mlp", "a("], r"include holds 'a\(', which is not a regular expression: .*Match any text with '\.\*'"),
    ("exclude", "attn", r"exclude must be a list of regular expressions, got 'attn'"),
    ("exclude", ["*"], r"exclude holds '\*', which is not a regular expression"),
    ("exclude", {"attn": 4}, r"exclude must be a list of regular expressions, got {'attn': 4}"),
    ("blocks", "BertLayer", r"blocks must be a list of regular expressions, got 'BertLayer'"),
    ("blocks", ["*"], r"blocks holds '\*', which is not a regular expression"),
    ("ignore_source", "to_q", r"ignore_source must be a list of regular expressions, got 'to_q'"),
    ("ignore_source", ["("], r"ignore_source holds '\(', which is not a regular expression"),
    ("dense_checkpointing", "yes", r"dense_checkpointing must be True or False, got 'yes'"),
    ("dense_accumulation", 0, r"dense_accumulation must be a whole number of at least 1, got 0"),
    ("dense_accumulation", True, r"dense_accumulation must be a whole number of at least 1, got True"),
    ("truncation", "inputs", r"truncation must be one of weight, activation, got 'inputs'"),
    ("truncation", None, r"truncation must be one of weight, activation, got None"),
    ("recompute", "all", r"recompute must be one of none, bottleneck, got 'all'"),
    ("recompute", None, r"recompute must be one of none, bottleneck, got None"),
    ("group_by", "a(", r"group_by holds 'a\(', which is not a regular expression: .*Match any text with '\.\*'"),
    ("group_by", 2, r"group_by must be a list of regular expressions, got 2"),
    ("group_by", ["attn", 2], r"group_by must be a list of regular expressions, got \['attn', 2\]"),
    ("frozen_dtype", "float16", r"frozen_dtype must be bfloat16, int8, or unset, got 'float16'"),
    ("frozen_dtype", True, r"frozen_dtype must be bfloat16, int8, or unset, got True"),
    ("start", "finetune", r"start must be one of auto, scratch, pretrained, got 'finetune'"),
    ("start", None, r"start must be one of auto, scratch, pretrained, got None"),
    ("matrix_optimizer", "adam", r"matrix_optimizer must be one of none, muon, got 'adam'"),
    ("matrix_lr", 0, r"matrix_lr must be a number above 0, got 0"),
    ("matrix_lr", None, r"matrix_lr must be a number above 0, got None"),
    ("matrix_momentum", 1, r"matrix_momentum must be in \[0, 1\), got 1"),
    ("matrix_momentum", "0.9", r"matrix_momentum must be in \[0, 1\), got '0\.9'"),
    ("budget", 0, r"budget must be in \(0, 1\], got 0\. It is a share of dense training FLOPs\."),
    ("budget", 1.5, r"budget must be in \(0, 1\], got 1\.5"),
    ("budget", "half", r"budget must be in \(0, 1\], got 'half'"),
    ("adapter_alpha", 0, r"adapter_alpha must be a number above 0, got 0"),
    ("adapter_alpha", -16.0, r"adapter_alpha must be a number above 0, got -16\.0"),
    ("adapter_alpha", math.inf, r"adapter_alpha must be a number above 0, got inf"),
    ("adapter_init", "pissa", r"adapter_init must be one of zero, principal, split, got 'pissa'"),
    ("export", "lora", r"export must be one of dense, native, linear-pairs, adapter, got 'lora'"),
    ("tag_phases", 1, r"tag_phases must be True or False, got 1"),
    ("moments", "keep", r"moments must be one of project, reset, got 'keep'"),
    ("rewarmup_steps", -1, r"rewarmup_steps must be a whole number of at least 0, got -1\. The unit is steps"),
    ("rewarmup_steps", 0.1, r"rewarmup_steps must be a whole number of at least 0, got 0\.1\. The unit is steps"),
    ("rewarmup_start", 1.1, r"rewarmup_start must be in \[0, 1\], got 1\.1"),
    ("rewarmup_start", -0.1, r"rewarmup_start must be in \[0, 1\], got -0\.1"),
    ("rewarmup_start", math.nan, r"rewarmup_start must be in \[0, 1\], got nan"),
    ("factored_lr_scale", 0.0, r"factored_lr_scale must be a number above 0, got 0\.0"),
    ("factored_lr_scale", "2", r"factored_lr_scale must be a number above 0, got '2'"),
    ("adapter_lr_scale", -1, r"adapter_lr_scale must be a number above 0, got -1"),
    ("adapter_lr_scale", math.nan, r"adapter_lr_scale must be a number above 0, got nan"),
    ("left_lr_scale", 0, r"left_lr_scale must be a number above 0, got 0"),
    ("left_lr_scale", None, r"left_lr_scale must be a number above 0, got None"),
    ("right_lr_scale", -0.5, r"right_lr_scale must be a number above 0, got -0\.5"),
    ("right_lr_scale", math.inf, r"right_lr_scale must be a number above 0, got inf"),
    ("dense_query_key", "yes", r"dense_query_key must be True, False or None, got 'yes'"),
    ("frobenius_decay", "false", r"frobenius_decay must be .*, got 'false'"),
    ("frobenius_decay", 0.1, r"frobenius_decay must be .*, got 0\.1"),
    ("log_rank_steps", -1, r"log_rank_steps must be a whole number of at least 0, got -1"),
    ("log_rank_steps", True, r"log_rank_steps must be a whole number of at least 0, got True"),
    ("log_rank_per_layer", "no", r"log_rank_per_layer must be .*, got 'no'"),
    ("evaluate_at_switch", "no", r"evaluate_at_switch must be .*, got 'no'"),
    ("save_at_switch", None, r"save_at_switch must be .*, got None"),
    ("seed", -1, r"seed must be a whole number of at least 0, got -1"),
    ("seed", 0.5, r"seed must be a whole number of at least 0, got 0\.5"),
    ("seed", False, r"seed must be a whole number of at least 0, got False"),
]


@pytest.mark.parametrize(("field", "value", "message"), FIELDS)
def test_a_setting_outside_its_interval_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        DRTConfig(**{field: value})


def test_the_table_names_every_setting():
    assert {field for field, _, _ in FIELDS} == set(DRTConfig.__dataclass_fields__)


def test_an_unknown_setting_is_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank_ration'"):
        DRTConfig(rank_ration=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drt_rank_ratio": 4}, r"rank_ratio must be in \(0, 1\], got 4"),
        ({"drt_rank_pattern": "{"}, r"rank_pattern is not valid JSON"),
        ({"drt_schedule": "factored@x"}, r"'x' is not a phase boundary"),
        ({"drt_schedule": "papers"}, r"'papers' is neither a preset"),
        ({"drt_include": ["("]}, r"include holds '\('"),
    ],
)
def test_training_arguments_refuse_what_the_config_refuses(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DRTTrainingArguments(str(tmp_path), **settings)
