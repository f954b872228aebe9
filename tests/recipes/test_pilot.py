"""A pilot's processes take turns."""

import json
import subprocess
import sys
from pathlib import Path

import pilot
import pytest

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
METHOD = f"""
import json, sys
from types import SimpleNamespace
sys.path.insert(0, {str(BENCHMARKS)!r})
from pilot import Turns
name, steps, log, answer = sys.argv[1:]
turns = Turns(2)
for step in range(int(steps)):
    turns.on_step_begin(None, SimpleNamespace(global_step=step), None)
    print("a line of the Trainer")
    with open(log, "a") as file:
        file.write(f"{{name}}{{step}} begins\\n")
        file.write(f"{{name}}{{step}} ends\\n")
turns.on_train_end(None, None, None)
open(answer, "w").write(json.dumps({{"steps": int(steps)}}))
"""


@pytest.mark.slow
def test_turns_alternate_and_never_overlap(tmp_path):
    log = tmp_path / "log"
    answers = {name: tmp_path / name for name in ("a", "b")}
    commands = {
        name: [sys.executable, "-c", METHOD, name, steps, str(log), str(answers[name])]
        for name, steps in (("a", "3"), ("b", "5"))
    }
    assert dict(pilot.measured(commands, answers)) == {"a": {"steps": 3}, "b": {"steps": 5}}
    order = ["a0", "a1", "b0", "b1", "a2", "b2", "b3", "b4"]
    assert log.read_text().split("\n")[:-1] == [f"{step} {what}" for step in order for what in ("begins", "ends")]


@pytest.mark.slow
def test_a_process_that_fails_is_named_with_what_it_said(tmp_path):
    answers = {name: tmp_path / f"{name}.json" for name in ("bad", "good")}
    commands = {
        "bad": [sys.executable, "-c", "raise SystemExit('no such model')"],
        "good": [sys.executable, "-c", METHOD, "good", "1", str(tmp_path / "log"), str(answers["good"])],
    }
    records = pilot.measured(commands, answers)
    assert next(records) == ("good", {"steps": 1})  # is not lost
    with pytest.raises(RuntimeError, match=r"the pilot of bad failed:\nno such model"):
        next(records)


@pytest.mark.slow
def test_a_real_pilot_times_every_phase(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "benchmark.py"), "pilot", "brown_lm_small", "--results", str(tmp_path)]
    subprocess.run([*command, "--methods", "dense", "late"], check=True)
    found = [json.loads(line) for line in (tmp_path / "brown_lm_small-pilot.jsonl").read_text().splitlines()]
    phases = {record["method"]: record["phases"] for record in found}
    assert [phase["kind"] for phase in phases["late"]] == ["factored", "dense"]
    assert 0 < phases["late"][0]["step_seconds"] < phases["dense"][0]["step_seconds"]
