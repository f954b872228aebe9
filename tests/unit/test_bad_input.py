"""Bad input is refused where it is given, with a message that says what was given and what is allowed."""

import json
import math
import re
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from hf_drt import (
    Adapter,
    CheckpointError,
    Dense,
    DRTCallback,
    DRTConfig,
    DRTTrainer,
    DRTTrainingArguments,
    DynamicRank,
    Factored,
    Phase,
    Plan,
    Schedule,
    convert,
    empty_like,
    find_targets,
)
from hf_drt.checkpoint.state_file import STATE_NAME, read_state, write_state
from hf_drt.export import check_export
from hf_drt.forms import form_from_dict
from hf_drt.optim import moment_keys
from hf_drt.schedule import Run
from hf_drt.targets.surgery import Swap, replace
from hf_drt.trainer.refusals import refuse_unsupported

NAN = math.nan
SCHEDULE = "factored@0 dense@40% adapter@70%"
Q = "model.layers.0.self_attn.q_proj"

# ---- DRTConfig: every field

FIELDS = [
    ("schedule", "", r"schedule must be a non-empty text, got ''"),
    ("schedule", "  \n", r"schedule must be a non-empty text, got "),
    ("schedule", 40, r"schedule must be a non-empty text, got 40"),
    ("rank_ratio", 0, r"rank_ratio must be in \(0, 1\], got 0\. It is a share of min\(out, in\); .* use rank="),
    ("rank_ratio", -0.5, r"rank_ratio must be in \(0, 1\], got -0\.5"),
    ("rank_ratio", 4, r"rank_ratio must be in \(0, 1\], got 4\. .* for an absolute rank use rank="),
    ("rank_ratio", NAN, r"rank_ratio must be in \(0, 1\], got nan"),
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
    ("start", "finetune", r"start must be one of auto, scratch, pretrained, got 'finetune'"),
    ("start", None, r"start must be one of auto, scratch, pretrained, got None"),
    ("budget", 0, r"budget must be in \(0, 1\], got 0\. It is a share of dense training FLOPs\."),
    ("budget", 1.5, r"budget must be in \(0, 1\], got 1\.5"),
    ("budget", "half", r"budget must be in \(0, 1\], got 'half'"),
    ("adapter_alpha", 0, r"adapter_alpha must be a number above 0, got 0"),
    ("adapter_alpha", -16.0, r"adapter_alpha must be a number above 0, got -16\.0"),
    ("adapter_alpha", math.inf, r"adapter_alpha must be a number above 0, got inf"),
    ("adapter_init", "pissa", r"adapter_init must be one of zero, principal, got 'pissa'"),
    ("export", "lora", r"export must be one of dense, native, adapter, got 'lora'"),
    ("tag_phases", 1, r"tag_phases must be True or False, got 1"),
    ("moments", "keep", r"moments must be one of project, reset, got 'keep'"),
    ("rewarmup_steps", -1, r"rewarmup_steps must be a whole number of at least 0, got -1\. The unit is steps"),
    ("rewarmup_steps", 0.1, r"rewarmup_steps must be a whole number of at least 0, got 0\.1\. The unit is steps"),
    ("rewarmup_start", 1.1, r"rewarmup_start must be in \[0, 1\], got 1\.1"),
    ("rewarmup_start", -0.1, r"rewarmup_start must be in \[0, 1\], got -0\.1"),
    ("rewarmup_start", NAN, r"rewarmup_start must be in \[0, 1\], got nan"),
    ("factored_lr_scale", 0.0, r"factored_lr_scale must be a number above 0, got 0\.0"),
    ("factored_lr_scale", "2", r"factored_lr_scale must be a number above 0, got '2'"),
    ("adapter_lr_scale", -1, r"adapter_lr_scale must be a number above 0, got -1"),
    ("adapter_lr_scale", NAN, r"adapter_lr_scale must be a number above 0, got nan"),
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
        ({"drt_schedule": "factored@x"}, r"'x' is no phase boundary"),
        ({"drt_schedule": "papers"}, r"'papers' is neither a preset"),
        ({"drt_include": ["("]}, r"include holds '\('"),
    ],
)
def test_training_arguments_refuse_what_the_config_refuses(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DRTTrainingArguments(str(tmp_path), **settings)


# ---- the schedule's text

TEXTS = [
    ("", r"the schedule is empty; write e\.g\. 'factored@0 dense@40% adapter@80%'"),
    (" \t\n", r"the schedule is empty"),
    # kinds
    ("lora@0", r"'lora' in 'lora@0' is no form; allowed are dense, factored, adapter, lowrank"),
    ("Factored@0", r"'Factored' in 'Factored@0' is no form"),
    ("@0", r"'' in '@0' is no form"),
    ("factored@0 dense", r"'dense' has no boundary; a phase is written kind@boundary, e\.g\. dense@40%"),
    ("factored @0", r"'factored' has no boundary"),
    ("paper dense@90%", r"'paper' has no boundary"),
    # boundaries
    ("factored@", r"'' is no phase boundary; allowed is a share \(40%\), update steps \(400\), epochs \(1\.5ep\)"),
    ("factored@0 dense@half", r"'half' is no phase boundary; allowed is .*an LR anchor \(lr<0\.9, lr>0\.5\), I / D"),
    ("factored@0 dense@-5", r"'-5' is no phase boundary"),
    ("factored@0 dense@1.5", r"'1\.5' is no phase boundary"),
    ("factored@0 dense@1e3", r"'1e3' is no phase boundary"),
    ("factored@0 dense@40%%", r"'40%%' is no phase boundary"),
    ("factored@0,dense@40%", r"'0,dense@40%' is no phase boundary"),
    ("factored@0 dense@i", r"'i' is no phase boundary"),
    ("factored@0 dense@lr<-0.5", r"'lr<-0\.5' is no phase boundary"),
    ("factored@0 dense@lr=0.5", r"'lr=0\.5' is no phase boundary"),
    ("factored@0 dense@100%", r"a boundary in % must lie in \[0, 100\), got 100%\. A phase at 100% would never train"),
    ("factored@0 dense@250%", r"a boundary in % must lie in \[0, 100\), got 250%"),
    ("factored@0 dense@lr<1", r"an LR anchor must lie in \(0, 1\), got lr<1\. It is a share of the schedule's peak LR"),
    ("factored@0 dense@lr<0", r"an LR anchor must lie in \(0, 1\), got lr<0"),
    ("factored@0 dense@lr>1.5", r"an LR anchor must lie in \(0, 1\), got lr>1\.5"),
    ("factored@0 dense@lr<0.00", r"an LR anchor must lie in \(0, 1\)"),
    # ranks
    ("dense:8@0", r"'dense:8@0' gives a rank to the dense form, which has none; write dense@0"),
    ("factored:@0", r"'' in 'factored:@0' is no rank; allowed is a whole number of at least 1 \(factored:64\), or a"),
    ("factored:0@0", r"'0' in 'factored:0@0' is no rank"),
    ("factored:-8@0", r"'-8' in 'factored:-8@0' is no rank"),
    ("factored:1.5@0", r"'1\.5' in 'factored:1\.5@0' is no rank; .* in \(0, 1\] with a decimal point"),
    ("factored:0.0@0", r"'0\.0' in 'factored:0\.0@0' is no rank"),
    ("factored:many@0", r"'many' in 'factored:many@0' is no rank"),
    ("factored:nan@0", r"'nan' in 'factored:nan@0' is no rank"),
    ("factored:4:8@0", r"'4:8' in 'factored:4:8@0' is no rank"),
    ("adapter:25%@0", r"'25%' in 'adapter:25%@0' is no rank"),
    ("lowrank:x@0", r"'x' in 'lowrank:x@0' is no rank"),
    # neighbours
    ("dense@0 dense@40%", r"'dense@0 dense@40%' is one dense phase; drop the second"),
    ("factored@0 dense@40% dense@60%", r"'dense@40% dense@60%' is one dense phase"),
    # presets
    (
        "factored",
        r"'factored' is neither a preset \(paper, paper_conv, fixed, warmup, cyclic, decay, auto, adaptive\) nor",
    ),
    ("Paper", r"'Paper' is neither a preset"),
    ("relora(every=5)", r"'relora' is neither a preset"),
    ("paper(final", r"'paper\(final' is no schedule; write phases as kind@boundary"),
    ("paper fixed", r"'paper fixed' is no schedule"),
    ("paper(last=adapter)", r"preset 'paper' has no option 'last'; its options are: final"),
    ("paper(adapter)", r"preset 'paper' has no option 'adapter'; its options are: final"),
    ("fixed(rank=8)", r"preset 'fixed' has no option 'rank'; its options are: none"),
    ("paper(final=dense)", r"preset option final must be adapter or factored, got dense"),
    ("warmup(until=late)", r"option 'until' of preset 'warmup' must be like 40\.0, got 'late'"),
    ("warmup(until)", r"option 'until' of preset 'warmup' must be like 40\.0, got ''"),
    ("warmup(until=0)", r"preset option until must be in \(0, 100\), in % of the run, got 0"),
    ("warmup(until=100)", r"preset option until must be in \(0, 100\), in % of the run, got 100"),
    ("warmup(until=nan)", r"preset option until must be in \(0, 100\), in % of the run, got nan"),
    ("cyclic(windows=0)", r"preset option windows must be at least 1, got 0"),
    ("cyclic(windows=2.5)", r"option 'windows' of preset 'cyclic' must be like 2, got '2\.5'"),
    ("cyclic(share=100)", r"preset option share must be in \(0, 100\), in % of the run, got 100"),
    (
        "decay(first=0.1)",
        r"preset option first and last must be shares with 0 < last < first <= 1, got 0\.1 and 0\.125",
    ),
    ("decay(first=1.5)", r"preset option first and last must be shares .*, got 1\.5 and 0\.125"),
    ("decay(last=0)", r"preset option first and last must be shares .*, got 0\.375 and 0"),
    ("decay(stages=1)", r"preset option stages must be at least 2, got 1"),
    ("decay(shape=cubic)", r"preset option shape must be linear or exponential or sigmoid, got cubic"),
]


@pytest.mark.parametrize(("text", "message"), TEXTS)
def test_a_schedule_that_cannot_be_read_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text)


def flat(steps: int = 100, lr: float = 1.0) -> list[float]:
    return [lr] * steps


RUNS = [
    # LR anchors
    ("factored@0 dense@lr<0.5", {}, r"'@lr<0\.5' needs a learning-rate schedule that can be evaluated before the run"),
    ("factored@0 dense@lr>0.5", {}, r"'@lr>0\.5' needs a learning-rate schedule .* or steps"),
    (
        "factored@0 dense@lr<0.5",
        {"lr": flat},
        r"'@lr<0\.5' is never reached: after its peak 1 at step 0 .* lowest is 1 of it\. Choose an anchor above that",
    ),
    (
        "factored@0 dense@lr<0.2",
        {"lr": lambda: [0.5, 1.0] + [0.25] * 98},
        r"'@lr<0\.2' is never reached: after its peak 1 at step 1 the learning rate's lowest is 0\.25 of it",
    ),
    (
        "factored@0 dense@lr<0.5",
        {"lr": lambda: flat(lr=0.0)},
        r"'@lr<0\.5' needs a learning rate above 0, .* peak is 0\.",
    ),
    (
        "factored@0 dense@lr>0.5",
        {"lr": lambda: flat(lr=0.0)},
        r"'@lr>0\.5' needs a learning rate above 0, .* peak is 0\.",
    ),
    # epochs
    ("factored@0 dense@1ep", {}, r"'@1ep' needs data of known length; give the boundary in % or steps"),
    ("factored@0 dense@2ep", {"steps_per_epoch": 50}, r"'dense@100' never trains: the run ends at step 100"),
    # budget
    ("factored@0 dense@budget", {}, r"boundary 'budget' needs budget=, a share of dense training FLOPs in \(0, 1\]"),
    ("factored@0 dense@budget", {"budget": 0.5}, r"needs budget=.* a model whose layers tell what a step costs"),
    ("factored@budget dense@40%", {}, r"the first phase must start at step 0, got 'factored@budget'"),
    (
        "factored@0 dense@budget factored@budget",
        {},
        r"'factored@0 dense@budget factored@budget' has several boundaries at 'budget'; one budget decides one",
    ),
    (
        "factored@0 dense@budget",
        {"budget": 0.2, "cost": lambda kind, rank: 1.0 if kind == "dense" else 0.25},
        r"no boundary between 'factored' and 'dense' meets a budget of 0\.2: this schedule takes a share of dense "
        r"training FLOPs from 0\.25[78] to 0\.99[23]\. Change the budget or a rank, or train longer",
    ),
    (
        "factored@0 dense@budget factored@1",
        {"budget": 0.7, "cost": lambda kind, rank: 1.0 if kind == "dense" else 0.25},
        r"no boundary between 'factored' and 'dense': both together have 1 of 100 update steps\. Train for more",
    ),
    (
        "factored:budget@0 dense@40%",
        {"budget": 0.6, "cost": lambda kind, rank: 1.0 if kind == "dense" else 2 * rank},
        r"'factored:0\.25@0 dense@40' takes 0\.800 of dense training FLOPs, more than the budget of 0\.6\. Put a",
    ),
    (
        "factored@0 factored@budget",
        {"budget": 0.2, "cost": lambda kind, rank: 0.25},
        r"'factored' and 'factored' cost the same, so that no boundary between them is decided by a budget",
    ),
    ("auto", {}, r"a rank or boundary 'budget' needs budget="),
    (
        "auto",
        {"budget": 0.2, "cost": lambda kind, rank: 1.0 if kind == "dense" else 2 * rank + 0.2},
        r"no rank meets a budget of 0\.2: of the dense training FLOPs the factored form takes at least 0\.336, with "
        r"10% of the run in full rank\. Raise the budget",
    ),
    # order
    ("dense@40%", {}, r"the first phase must start at step 0, got 'dense@40%'\. Write dense@0, or a phase before it"),
    (
        "factored@1 dense@40%",
        {},
        r"the first phase must start at step 0, got 'factored@1'\. Write factored@0, or a phase before it",
    ),
    (
        "factored@0 dense@40.1% adapter@40.2%",
        {},
        r"phase boundaries cross: 'adapter@40' does not come after 'dense@40' \(of 100 update steps\)\. Move one of",
    ),
    ("factored@0 dense@80% adapter@40%", {}, r"phase boundaries cross: 'adapter@40' does not come after 'dense@80'"),
    ("factored@0 dense@0.1%", {}, r"phase boundaries cross: 'dense@0' does not come after 'factored@0'"),
    ("paper", {"max_steps": 1}, r"phase boundaries cross: 'dense@0' does not come after 'factored@0' \(of 1 update"),
    ("decay(stages=20)", {"max_steps": 10}, r"phase boundaries cross: .* \(of 10 update steps\)"),
    # the end
    ("factored@0 dense@100", {}, r"'dense@100' never trains: the run ends at step 100\. Start the phase earlier, or"),
    ("factored@0 dense@99.5%", {}, r"'dense@100' never trains: the run ends at step 100"),
    ("factored@0", {"max_steps": 0}, r"the schedule 'factored@0' never trains: the run has 0 update steps"),
    ("factored@0", {"max_steps": -1}, r"the schedule 'factored@0' never trains: the run has -1 update steps"),
]


@pytest.mark.parametrize(("text", "run", "message"), RUNS)
def test_a_schedule_that_does_not_fit_the_run_is_refused(text, run, message):
    with pytest.raises(ValueError, match=message):
        Schedule.parse(text).resolve(Run(**{"max_steps": 100} | run))


@pytest.mark.parametrize(
    ("phases", "max_steps", "message"),
    [
        ((), 10, r"the first phase must start at step 0, got the plan ''"),
        ((Phase(0, "dense"),), 0, r"the plan 'dense@0' never trains: the run has 0 update steps"),
        ((Phase(0, "dense"), Phase(0, "adapter")), 10, r"phase boundaries cross: 'adapter@0' does not come after"),
        ((Phase(0, "dense"), Phase(10, "adapter")), 10, r"'adapter@10' never trains: the run ends at step 10"),
    ],
)
def test_a_plan_that_never_trains_a_phase_is_refused(phases, max_steps, message):
    with pytest.raises(ValueError, match=message):
        Plan(phases, max_steps)


# ---- forms


def linear(value: float | None = None) -> nn.Linear:
    layer = nn.Linear(8, 6)
    if value is not None:
        layer.weight.data[0, 0] = value
    return layer


@pytest.mark.parametrize("make", [convert, empty_like])
@pytest.mark.parametrize("form", [Factored(7), Adapter(7)], ids=str)
def test_a_rank_outside_of_the_layer_is_refused(make, form):
    message = rf"rank must lie in 1\.\.6 for a layer of shape \(out, in\) = \(6, 8\), got {form.rank}\."
    with pytest.raises(ValueError, match=message):
        make(linear(), form)


@pytest.mark.parametrize("make", [convert, empty_like])
@pytest.mark.parametrize("form", ["dense", None, Dense], ids=str)
def test_what_is_no_form_is_refused(make, form):
    with pytest.raises(
        TypeError, match=r"is no form; allowed are Dense\(\), Factored\(rank\) and Adapter\(rank, alpha"
    ):
        make(linear(), form)


@pytest.mark.parametrize("make", [Factored, Adapter])
@pytest.mark.parametrize("rank", [2.5, "2", True, 0, -1])
def test_a_rank_that_is_no_whole_number_is_refused(make, rank):
    with pytest.raises(ValueError, match=rf"rank must be a whole number of at least 1, got {rank!r}"):
        make(rank)


def test_an_unknown_start_of_an_adapter_is_refused():
    with pytest.raises(ValueError, match=r"init.*principle"):
        convert(linear(), Adapter(2, init="principle"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("form", [Factored(2), Adapter(2, init="principal")], ids=str)
def test_a_weight_that_is_not_finite_is_not_decomposed(form, value):
    layer = linear(value)
    with pytest.raises(
        ValueError,
        match=r"weight of a layer of shape \(out, in\) = \(6, 8\) holds inf or nan\. The training has diverged",
    ):
        convert(layer, form)
    assert type(layer) is nn.Linear


def test_factors_that_are_not_finite_are_not_decomposed():
    factored = convert(linear(), Factored(2)).module
    factored.U.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="holds inf or nan"):
        convert(factored, Factored(1))


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"form": "lora", "rank": 4},
        {"form": "Factored", "rank": 4},
        {"form": "factored"},
        {"form": "factored", "rank": 4, "alpha": 16},
        {"form": "dense", "rank": 4},
        {"rank": 4},
    ],
)
def test_a_dict_that_describes_no_form_is_refused(data):
    with pytest.raises(
        ValueError, match=r"describes no form; allowed are dense, factored \(rank\) and adapter \(rank, al"
    ):
        form_from_dict(data)


# ---- selection


@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (lambda: nn.Conv2d(1, 1, 1), {}, r"Conv2d has 0 transformer blocks.*as follows: 1 outside of the blocks"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, r"Sequential has 0 transformer blocks.*1 outside of the blocks"),
        (
            tiny.llama,
            {"include": ["conv"]},
            r"no layer to train in changing rank: LlamaForCausalLM has 2 transformer blocks, .*: 14 not matched by "
            r"include; 1 outside of the blocks\. include=\['conv'\], exclude=None; patterns are regular expressions on",
        ),
        (
            tiny.llama,
            {"exclude": [""]},
            r"14 matched by exclude; 1 outside of the blocks\. include=None, exclude=\[''\]",
        ),
        (lambda: tiny.llama().requires_grad_(False), {}, r"14 frozen"),
    ],
    ids=["no linear layer", "no block", "include", "exclude", "frozen"],
)
def test_a_model_without_a_target_is_refused_with_what_was_found(model, patterns, message):
    with pytest.raises(ValueError, match=message):
        find_targets(model(), **patterns)


# ---- the controller


def config_of(**settings) -> DRTConfig:
    return DRTConfig(**{"schedule": SCHEDULE, "rank_multiple": 4} | settings)


@pytest.mark.parametrize(
    ("config", "max_steps", "message"),
    [
        (DRTConfig(), 10, r"DynamicRank needs either a plan, or config\.schedule and max_steps"),
        (config_of(), None, r"DynamicRank needs either a plan, or config\.schedule and max_steps"),
        (config_of(), 0, r"never trains: the run has 0 update steps"),
        (config_of(schedule="factored@0 dense@1ep"), 10, r"'@1ep' needs data of known length"),
        (config_of(include=["conv"]), 10, r"14 not matched by include"),
        (
            config_of(rank_ratio=1.0),
            10,
            rf"phase 'factored@0' leaves all 14 layers dense: their ranks reach break-even, e\.g\. 16 for {Q} of shape "
            r"\(out, in\) = \(32, 32\), .*Lower the rank .*, or rank_multiple for small layers",
        ),
        (config_of(rank_multiple=64), 10, r"leaves all 14 layers dense: their ranks reach break-even"),
        (DRTConfig(schedule="dense@0 adapter:500@5"), 10, r"phase 'adapter:500@5' leaves all 14 layers dense"),
    ],
)
def test_a_controller_that_could_not_do_anything_is_refused(config, max_steps, message):
    with pytest.raises(ValueError, match=message):
        DynamicRank(tiny.llama(), config, max_steps)


class OtherAdam(torch.optim.Adam):
    """Third parties' subclasses may keep state that is not known here."""


class AdamW(torch.optim.SGD):
    """Has the name of a supported one, as bitsandbytes' AdamW."""


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (torch.optim.Adagrad, r"torch\.optim\.adagrad\.Adagrad"),
        (torch.optim.Adadelta, r"torch\.optim\.adadelta\.Adadelta"),
        (torch.optim.LBFGS, r"torch\.optim\.lbfgs\.LBFGS"),
        (torch.optim.Adafactor, r"torch\.optim\.Adafactor"),
        (OtherAdam, r"test_bad_input\.OtherAdam"),
        (AdamW, r"test_bad_input\.AdamW"),
    ],
)
def test_an_optimizer_whose_state_is_unknown_is_refused_by_its_full_name(make, name):
    optimizer = make([nn.Parameter(torch.zeros(2, 2))])
    message = (
        rf"the optimizer (\w+\.)*{name} cannot follow a change of form: .*Allowed are torch\.optim\.Adam, "
        r"torch\.optim\.AdamW, torch\.optim\.NAdam, torch\.optim\.RAdam, torch\.optim\.RMSprop, torch\.optim\.SGD, "
        r"transformers\.optimization\.Adafactor \(optim=adamw_torch, adamw_torch_fused, sgd, adafactor or rmsprop\), "
        r"and no classes derived from them or named like them\."
    )
    with pytest.raises(ValueError, match=message):
        moment_keys(optimizer)


def start(model: nn.Module, **settings) -> DynamicRank:
    controller = DynamicRank(model, config_of(**settings), max_steps=10)
    controller.apply(0)
    return controller


NOT_IN_OPTIMIZER = rf"the weights of {Q} are not in the optimizer\. Make it after the first phase .* use exclude="


@pytest.mark.parametrize("step", [0, 4], ids=["first step", "switch"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: torch.optim.Adagrad(model.parameters()),
            r"the optimizer torch\.optim\.adagrad\.Adagrad cannot follow a change of form",
        ),
        (lambda model: torch.optim.AdamW(model.lm_head.parameters()), NOT_IN_OPTIMIZER),
        (
            lambda model: torch.optim.AdamW(p for name, p in model.named_parameters() if name != f"{Q}.V"),
            NOT_IN_OPTIMIZER,
        ),
    ],
    ids=["adagrad", "other weights", "one factor missing"],
)
def test_an_optimizer_that_cannot_follow_is_refused_and_the_model_stays(make, message, step):
    model = tiny.llama()
    # With a multiplier the weights are looked up at once, else at the first switch.
    controller = start(model, factored_lr_scale=2.0)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        controller.begin_step(step, make(model))
    assert {name: id(module) for name, module in model.named_modules()} == before


class Wrapper(nn.Module):
    """What adapter libraries put in the place of a layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.base_layer = layer


@pytest.mark.parametrize("step", [4, 7], ids=["to dense", "to adapter"])
@pytest.mark.parametrize(
    "other",
    [nn.Identity(), Wrapper(nn.Linear(32, 32)), nn.Linear(32, 64), nn.Conv1d(32, 32, 1), None],
    ids=["no linear layer", "wrapped", "other shape", "convolution", "deleted"],
)
def test_a_layer_that_somebody_else_has_replaced_is_refused_by_name(other, step):
    model = tiny.llama()
    controller = start(model)
    if step == 7:
        controller.apply(4)
    optimizer = torch.optim.AdamW(model.parameters())
    model.model.layers[0].self_attn.q_proj = other
    with pytest.raises(ValueError, match=rf"{Q}.*(all other changes|replaced)"):
        controller.begin_step(step, optimizer)


def test_replacing_a_layer_that_is_gone_is_refused_and_nothing_is_replaced():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = list(model)
    swaps = [Swap("0", model[0], nn.Identity()), Swap("7", nn.Linear(2, 2), nn.Identity())]
    with pytest.raises(ValueError, match=r"7 is not in the model any more\. Something else has replaced it"):
        replace(model, swaps)
    assert list(model) == before


# ---- the callback in a plain Trainer


def plain_trainer(folder, config=SCHEDULE, model=None, **changes) -> Trainer:
    defaults = {"max_steps": 4, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    args = TrainingArguments(str(folder), **defaults | changes)
    data = tiny.dataset()
    return Trainer(model or tiny.llama(), args, train_dataset=data, eval_dataset=data, callbacks=[DRTCallback(config)])


def test_a_callback_without_a_schedule_is_refused():
    with pytest.raises(ValueError, match=r"DRTCallback needs a schedule, e\.g\. 'factored@0 dense@40%.*; got None"):
        DRTCallback(DRTConfig())


@pytest.mark.parametrize("config", [None, {"schedule": SCHEDULE}, 4], ids=["None", "dict", "number"])
def test_a_callback_with_settings_of_another_type_is_refused(config):
    message = rf"drt settings must be a DRTConfig, or a schedule's text .*, got {re.escape(repr(config))}\."
    with pytest.raises(TypeError, match=message):
        DRTCallback(config)


STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (
            config_of(),
            {"load_best_model_at_end": True, **STEPS},
            r"load_best_model_at_end loads weights of one phase into the structure of another .*Use DRTTrainer",
        ),
        (config_of(factored_lr_scale=2.0), {}, r"factored_lr_scale, .* need parameter groups .* Use DRTTrainer"),
        (config_of(adapter_lr_scale=2.0), {}, r"adapter_lr_scale .* need parameter groups .* Use DRTTrainer"),
        (config_of(frobenius_decay=True), {}, r"frobenius_decay need parameter groups .* Use DRTTrainer"),
        (config_of(include=["conv"]), {}, r"no layer to train in changing rank"),
    ],
    ids=["best model", "factored_lr_scale", "adapter_lr_scale", "frobenius_decay", "no target"],
)
def test_a_plain_trainer_refuses_what_only_a_drt_trainer_can_do(tmp_path, config, changes, message):
    with pytest.raises(ValueError, match=message):
        plain_trainer(tmp_path, config, **changes)


def test_a_plain_trainer_refuses_several_processes(tmp_path):
    args = SimpleNamespace(world_size=2)
    with pytest.raises(ValueError, match=r"DRTCallback runs on one process, got 2\. Use DRTTrainer"):
        DRTCallback(SCHEDULE).on_init_end(args, None, None, model=tiny.llama())


def test_a_plain_trainer_cannot_resume(tmp_path):
    config = config_of(schedule="dense@0 factored@50%")
    plain_trainer(tmp_path, config, save_strategy="steps", save_steps=1).train()
    message = r"DRTCallback in a plain Trainer cannot resume: .* Use DRTTrainer or DRTTrainerMixin to resume"
    with pytest.raises(ValueError, match=message):
        plain_trainer(tmp_path, config).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    # In low-rank form the weights do not even load.
    with pytest.raises(RuntimeError, match=rf"size mismatch for {Q}\.weight"):
        plain_trainer(tmp_path, config).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


# ---- DRTTrainer


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
        ({"is_deepspeed_enabled": True}, {}, r"DeepSpeed, which flattens .* \(ZeRO-1, 2\) .* \(ZeRO-3\)\. Use FSDP2"),
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
            {"is_fsdp_enabled": True, "accelerator": fsdp(2), "model": tiny.mixtral()},
            {},
            r"experts cannot change form under FSDP, and model\.layers\.0\.mlp\.experts\..*_proj is selected\. Keep",
        ),
        (
            {"model": tiny.mixtral()},
            {"export": "adapter"},
            r"export=adapter saves a LoRA of PEFT, .* and model\.layers\.0\.mlp\.experts\..*_proj is selected\. Keep",
        ),
    ],
)
def test_an_engine_that_is_not_supported_is_refused(found, config, message):
    refuse_unsupported(engine(), config_of())
    with pytest.raises(ValueError, match=message):
        refuse_unsupported(engine(**found), config_of(**config))


@pytest.mark.parametrize(
    ("found", "config"), [({"is_fsdp_enabled": True, "accelerator": fsdp(2)}, {}), ({}, {"export": "adapter"})]
)
def test_a_mixture_whose_experts_stay_dense_is_not_refused(found, config):
    refuse_unsupported(engine(model=tiny.mixtral(), **found), config_of(exclude=["experts"], **config))


@pytest.mark.parametrize("strategy", [s for s in HubStrategy if s != HubStrategy.END])
def test_pushing_during_training_and_tags_are_allowed(strategy):
    refuse_unsupported(engine(push_to_hub=True, hub_strategy=strategy), config_of(tag_phases=True))
    check_export("dense", plan_of("factored@0 dense@4"), pushing(hub_strategy=strategy), fsdp=False)


def pushing(**changes) -> SimpleNamespace:
    """Training arguments of a run that pushes."""
    return engine(**{"push_to_hub": True, **changes}).args


def plan_of(text: str):
    return Schedule.parse(text).resolve(Run(8))


NO_SHARDS = (
    r"under FSDP no process holds the model to push it .*\(hub_strategy={}\) .* Use hub_strategy=end, and export=d"
)


@pytest.mark.parametrize(
    ("export", "schedule", "changes", "fsdp", "message"),
    [
        ("adapter", "adapter@0 dense@4", {"push_to_hub": False}, False, r"'dense.*' they are dense\. End the schedule"),
        (
            "adapter",
            "factored@0",
            {"push_to_hub": False},
            False,
            r"saves layers in adapter form, but in phase 'factored",
        ),
        ("adapter", "dense@0 adapter@4", {}, False, r"in phase 'dense.*' they .* push with hub_strategy=end; or use"),
        ("dense", "dense@0", {}, True, NO_SHARDS.format("every_save")),
        ("native", "dense@0", {"hub_strategy": HubStrategy.CHECKPOINT}, True, NO_SHARDS.format("checkpoint")),
        ("adapter", "adapter@0", {"push_to_hub": False}, True, r"or to save it with export=adapter\. Use hub_strategy"),
    ],
)
def test_an_export_that_a_phase_or_an_engine_does_not_have_is_refused(export, schedule, changes, fsdp, message):
    with pytest.raises(ValueError, match=message):
        check_export(export, plan_of(schedule), pushing(**changes), fsdp)


@pytest.mark.parametrize("found", [{"hub_strategy": HubStrategy.END}, {"save_strategy": SaveStrategy.NO}], ids=str)
def test_a_push_of_the_last_model_alone_asks_nothing_of_earlier_phases(found):
    check_export("adapter", plan_of("dense@0 adapter@4"), pushing(**found), fsdp=False)
    check_export("dense", plan_of("dense@0 adapter@4"), pushing(**found), fsdp=True)


def test_evaluation_at_a_switch_without_data_is_refused(tmp_path):
    args = tiny.arguments(tmp_path, drt_evaluate_at_switch=True)
    with pytest.raises(ValueError, match=r"evaluate_at_switch needs an eval_dataset, got None"):
        DRTTrainer(tiny.llama(), args, train_dataset=tiny.dataset())


@pytest.mark.parametrize("setting", [{"factored_lr_scale": 2.0}, {"adapter_lr_scale": 2.0}, {"frobenius_decay": True}])
def test_a_scheduler_made_before_the_form_groups_is_refused(tmp_path, setting):
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(
        ValueError, match=r"add parameter groups, but a scheduler was passed .*optimizers=\(optimizer, Non"
    ):
        DRTTrainer(
            model,
            tiny.arguments(tmp_path, drt_schedule=None),
            train_dataset=tiny.dataset(),
            optimizers=(optimizer, scheduler),
            drt=config_of(**setting),
        )


@pytest.mark.parametrize("drt", [{"schedule": SCHEDULE}, 4, ["factored@0"]], ids=str)
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
        ({"optim": "adagrad"}, r"the optimizer torch\.optim\.adagrad\.Adagrad cannot follow a change of form"),
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
    ids=["adagrad", "too short", "break-even", "constant LR", "zero LR", "plateau", "no length"],
)
def test_a_run_that_cannot_go_to_its_end_is_refused_before_its_first_step(tmp_path, changes, message):
    data = changes.get("train_dataset", tiny.dataset())
    args = tiny.arguments(tmp_path, **{k: v for k, v in changes.items() if k != "train_dataset"})
    trainer = DRTTrainer(tiny.llama(), args, train_dataset=data, eval_dataset=tiny.dataset())
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- the state file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"has no drt_state\.json: it was not written by dynamic-rank training, or not completely\. Resume from"),
        ("", r"drt_state\.json is damaged \(.*\)\. Resume from another checkpoint"),
        ('{"format_version": 1,', r"drt_state\.json is damaged \(.*\)\. Resume from another checkpoint"),
        ("[]", r"drt_state\.json is damaged \(no JSON object\)\. Resume from another checkpoint"),
        ("1", r"drt_state\.json is damaged \(no JSON object\)"),
        ("{}", r"has format version None: it is damaged\. Resume from another checkpoint"),
        ('{"format_version": 2}', r"has format version 2; this hf_drt reads 1 to 1\. Upgrade hf_drt"),
        ('{"format_version": 0}', r"has format version 0: it is damaged\. Resume from another checkpoint"),
        ('{"format_version": 1.0}', r"has format version 1\.0: it is damaged\. Resume from another checkpoint"),
    ],
)
def test_a_state_file_that_cannot_be_read_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / STATE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_state(tmp_path)


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_state(tmp_path, {"phase": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_state(tmp_path, {"phase": object()})
    assert read_state(tmp_path) == {"phase": 1}
    assert json.loads((tmp_path / STATE_NAME).read_text())["format_version"] == 1


def test_a_state_that_cannot_be_written_leaves_no_rest_behind(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_state(tmp_path, {"phase": object()})
    assert list(tmp_path.iterdir()) == []
