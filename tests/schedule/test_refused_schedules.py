"""A schedule that cannot be read, or that does not fit the run, is refused with what would."""

import pytest

from hf_drt import Phase, Plan, Schedule
from hf_drt.schedule import Run

TEXTS = [
    ("", r"the schedule is empty; write e\.g\. 'factored@0 dense@40% adapter@80%'"),
    (" \t\n", r"the schedule is empty"),
    # kinds
    ("lora@0", r"'lora' in 'lora@0' is not a form; allowed are dense, factored, adapter, lowrank"),
    ("Factored@0", r"'Factored' in 'Factored@0' is not a form"),
    ("@0", r"'' in '@0' is not a form"),
    ("factored@0 dense", r"'dense' has no boundary; a phase is written kind@boundary, e\.g\. dense@40%"),
    ("factored @0", r"'factored' has no boundary"),
    ("paper dense@90%", r"'paper' has no boundary"),
    # boundaries
    ("factored@", r"'' is not a phase boundary; allowed is a share \(40%\), update steps \(400\), epochs \(1\.5ep\)"),
    ("factored@0 dense@half", r"'half' is not a phase boundary; allowed is .*an LR anchor \(lr<0\.9, lr>0\.5\), I / D"),
    ("factored@0 dense@-5", r"'-5' is not a phase boundary"),
    ("factored@0 dense@1.5", r"'1\.5' is not a phase boundary"),
    ("factored@0 dense@1e3", r"'1e3' is not a phase boundary"),
    ("factored@0 dense@40%%", r"'40%%' is not a phase boundary"),
    ("factored@0,dense@40%", r"'0,dense@40%' is not a phase boundary"),
    ("factored@0 dense@i", r"'i' is not a phase boundary"),
    ("factored@0 dense@lr<-0.5", r"'lr<-0\.5' is not a phase boundary"),
    ("factored@0 dense@lr=0.5", r"'lr=0\.5' is not a phase boundary"),
    ("factored@0 dense@100%", r"a boundary in % must lie in \[0, 100\), got 100%\. A phase at 100% would never train"),
    ("factored@0 dense@250%", r"a boundary in % must lie in \[0, 100\), got 250%"),
    ("factored@0 dense@lr<1", r"an LR anchor must lie in \(0, 1\), got lr<1\. It is a share of the schedule's peak LR"),
    ("factored@0 dense@lr<0", r"an LR anchor must lie in \(0, 1\), got lr<0"),
    ("factored@0 dense@lr>1.5", r"an LR anchor must lie in \(0, 1\), got lr>1\.5"),
    ("factored@0 dense@lr<0.00", r"an LR anchor must lie in \(0, 1\)"),
    # ranks
    ("dense:8@0", r"'dense:8@0' gives a rank to the dense form, which has none; leave ':8' out"),
    ("factored:@0", r"'' in 'factored:@0' is not a rank; allowed is a whole number of at least 1 \(factored:64\), or"),
    ("factored:0@0", r"'0' in 'factored:0@0' is not a rank"),
    ("factored:-8@0", r"'-8' in 'factored:-8@0' is not a rank"),
    ("factored:1.5@0", r"'1\.5' in 'factored:1\.5@0' is not a rank; .* in \(0, 1\] with a decimal point"),
    ("factored:0.0@0", r"'0\.0' in 'factored:0\.0@0' is not a rank"),
    ("factored:many@0", r"'many' in 'factored:many@0' is not a rank"),
    ("factored:nan@0", r"'nan' in 'factored:nan@0' is not a rank"),
    ("factored:4:8@0", r"'4:8' in 'factored:4:8@0' is not a rank"),
    ("adapter:25%@0", r"'25%' in 'adapter:25%@0' is not a rank"),
    ("lowrank:x@0", r"'x' in 'lowrank:x@0' is not a rank"),
    # neighbours
    ("dense@0 dense@40%", r"'dense@0 dense@40%' is one dense phase; drop the second"),
    ("factored@0 dense@40% dense@60%", r"'dense@40% dense@60%' is one dense phase"),
    # presets
    (
        "factored",
        r"'factored' is neither a preset \(paper, paper_conv, fixed, .*, auto, auto_late, adaptive\) nor",
    ),
    ("Paper", r"'Paper' is neither a preset"),
    ("relora(every=5)", r"'relora' is neither a preset"),
    ("paper(final", r"'paper\(final' is not a schedule; write phases as kind@boundary"),
    ("paper fixed", r"'paper fixed' is not a schedule"),
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
    ("drift(first=0)", r"preset option first and last must be shares of min\(out, in\) in \(0, 1\], got 0 and 0\.125"),
    ("drift(first=nan)", r"first and last must be shares of min\(out, in\) in \(0, 1\], got nan and 0\.125"),
    ("drift(last=1.5)", r"preset option first and last must be shares of .*, got 0\.5 and 1\.5"),
    (
        "drift(last=0.5)",
        r"first and last must be different \(one .* the schedule 'adapter:0\.5@0'\), got 0\.5 and 0\.5",
    ),
    ("drift(shape=cubic)", r"shape must be one of linear, cosine, sigmoid, exponential, logarithmic, got cubic"),
    ("drift(shape=linear,steepness=5)", r"steepness must be left out but for shape=sigmoid or exponential or logarit"),
    ("drift(shape=cosine,steepness=5)", r"steepness must be left out .*, got 5 with shape=cosine"),
    ("drift(shape=exponential,midpoint=30)", r"midpoint must be left out but for shape=sigmoid, got 30 with shape=exp"),
    ("drift(steepness=0)", r"preset option steepness must be in \[0\.01, 1000\], got 0\.0"),
    ("drift(steepness=inf)", r"preset option steepness must be in \[0\.01, 1000\], got inf"),
    ("drift(midpoint=100)", r"preset option midpoint must be in \(0, 100\), in % of until, got 100\.0"),
    ("drift(until=0)", r"preset option until must be in \(0, 100\], in % of the run, got 0\.0"),
    ("drift(levels=1)", r"preset option levels must be in 2\.\.32, since each but the first costs a switch, got 1"),
    ("drift(levels=33)", r"preset option levels must be in 2\.\.32, .*, got 33"),
    ("drift(rank=3)", r"preset 'drift' has no option 'rank'; its options are: first, last, shape, steepness, midpoint"),
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
        {"budget": 0.2, "cost": lambda kind, rank: 2 * rank + 0.2},
        r"no rank meets a budget of 0\.2: of .* FLOPs the factored form takes at least 0\.263\. Raise the budget",
    ),
    (
        "factored:budget@0 factored:0.5@50",
        {"budget": 0.3, "cost": lambda kind, rank: 2 * rank},
        r"rank 'budget' leaves nothing of the run for full rank, and '.*' takes .* more than the budget of 0\.3\. Put",
    ),
    (
        "auto_late",
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
    ("rotate(groups=8)", {"max_steps": 10}, r"phase boundaries cross: .* train for more steps, or take fewer groups"),
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
