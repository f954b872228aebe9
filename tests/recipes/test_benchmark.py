"""The benchmark harness: which settings a run has, which records count, what the tables say."""

import json
import subprocess
import sys
from pathlib import Path

import benchmark
import pytest
import store
from benchmark import Missing, settings_of
from store import Store
from tables import print_table, rows

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"
TASK = {
    "kind": "causal_lm",
    "model": {"hidden_size": 64},
    "data": {"block_size": 32},
    "training": {"max_steps": 100, "learning_rate": 1e-3},
    "measure": {"points": 2},
    "methods": {
        "dense": {},
        "narrow": {"model": {"hidden_size": 32}},
        "late": {"training": {"drt_schedule": "factored@0 dense@80%"}},
        "late_warm": {"like": "late", "training": {"drt_rewarmup_steps": 5}},
        "dense_equal": {"as_long_as": "late"},
        "lora": {"peft": {"r": 8}},
    },
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of benchmarks with the one task 'made_up'."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made_up.json").write_text(json.dumps(TASK))
    monkeypatch.setattr(store, "HERE", tmp_path)
    return tmp_path


def record(method: str, seed: int, results: Store, value: float = 1.0, seconds: float = 10.0) -> dict:
    settings = settings_of("made_up", method, seed, results)
    phase = {"trainable": 10, "steps": 100, "peak_mib": 50.0}
    return {
        "settings": settings, "value": value, "seconds": 2 * seconds, "cpu_seconds": seconds, "flops": 5 * seconds,
        "steps": 100, "phases": [phase], "curve": [{"effective_rank": 7.0}],
    }  # fmt: skip


def test_a_method_changes_what_it_names(folder):
    results = Store(folder, "made_up")
    assert settings_of("made_up", "narrow", 1, results)["model"] == {"hidden_size": 32}
    assert settings_of("made_up", "late_warm", 1, results)["training"] == {
        **TASK["training"], "drt_schedule": "factored@0 dense@80%", "drt_rewarmup_steps": 5,
    }  # fmt: skip
    assert settings_of("made_up", "lora", 1, results)["peft"] == {"r": 8}


def test_a_run_as_long_as_another_has_its_seconds(folder):
    results = Store(folder, "made_up")
    with pytest.raises(Missing, match="dense, seed 1"):
        settings_of("made_up", "dense_equal", 1, results)
    results.add("dense", record("dense", 1, results, seconds=20.0))
    with pytest.raises(Missing, match="late, seed 1"):
        settings_of("made_up", "dense_equal", 1, results)
    results.add("late", record("late", 1, results, seconds=12.0))
    assert settings_of("made_up", "dense_equal", 1, results)["training"]["max_steps"] == 60


def test_a_record_counts_while_the_settings_are_the_same(folder):
    results = Store(folder, "made_up")
    results.add("late", record("late", 1, results))
    again = Store(folder, "made_up")
    assert again.find("late", settings_of("made_up", "late", 1, again)) is not None
    assert again.find("late", settings_of("made_up", "late", 2, again)) is None
    assert again.find("dense", settings_of("made_up", "late", 1, again)) is None
    changed = json.loads(json.dumps(TASK))
    changed["training"]["learning_rate"] = 2e-3
    (folder / "tasks" / "made_up.json").write_text(json.dumps(changed))
    assert again.find("late", settings_of("made_up", "late", 1, again)) is None


def test_a_line_cut_short_by_a_kill_is_made_again_and_others_are_refused(folder):
    results = Store(folder, "made_up")
    results.add("dense", record("dense", 1, results))
    text = results.path.read_text()
    results.path.write_text(text + text[:40])
    again = Store(folder, "made_up")
    assert len(again.records) == 1
    again.add("late", record("late", 1, again))
    with pytest.raises(ValueError, match=r"line 2 of .* is no JSON\. Delete it"):
        Store(folder, "made_up")


def test_only_what_is_missing_is_run(folder, monkeypatch, capsys):
    made = []

    def run_apart(settings, cache):
        method = "dense" if "drt_schedule" not in settings["training"] else "late"
        made.append((method, settings["seed"], settings["training"]["max_steps"]))
        return record(method, settings["seed"], Store(folder, "made_up"), seconds=10.0) | {"settings": settings}

    monkeypatch.setattr(benchmark, "run_apart", run_apart)
    command = ["run", "made_up", "--results", str(folder), "--methods", "dense_equal", "dense", "late", "--seeds", "1"]
    benchmark.main(command)
    assert made == [("dense", 1, 100), ("late", 1, 100)]
    assert "dense_equal, seed 1: waits for dense, seed 1" in capsys.readouterr().out
    benchmark.main(command)
    assert made[2:] == [("dense", 1, 100)]  # as long as 'late', which took as long as 'dense'


def test_rows_are_means_and_ratios_of_equal_seeds(folder, capsys):
    results = Store(folder, "made_up")
    for seed, dense, late in ((1, 20.0, 10.0), (2, 40.0, 30.0)):
        results.add("dense", record("dense", seed, results, value=2.0 + seed, seconds=dense))
        results.add("late", record("late", seed, results, value=1.0 * seed, seconds=late))
    by_method = {row["method"]: row for row in rows("made_up", results, [1, 2, 3])}
    assert by_method["late"]["value"] == 1.5
    assert by_method["late"]["deviation"] == pytest.approx(0.5**0.5)
    assert by_method["late"]["time"] == pytest.approx((0.5 + 0.75) / 2)
    assert by_method["dense"]["time"] == 1.0
    assert by_method["late"]["seeds"] == 2
    print_table("made_up", results, [1, 2, 3])
    assert "| late | 1.5000 ± 0.7071 | 2 | 0.62 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["run", "nothing"], r"no task is named 'nothing'; there are .*brown_lm_small"),
        (["run", "brown_lm_small", "--methods", "magic"], r"task brown_lm_small has no method 'magic'; it has dense"),
    ],
)
def test_bad_input_is_named(command, message):
    with pytest.raises(SystemExit, match=message):
        benchmark.main(command)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is no JSON"), ("{}", r"lacks data, kind, measure, methods, model")]
)
def test_a_broken_task_file_is_named(folder, text, message):
    (folder / "tasks" / "made_up.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        store.task_file("made_up")


def test_a_method_with_an_unknown_section_is_refused(folder):
    (folder / "tasks" / "made_up.json").write_text(json.dumps(TASK | {"methods": {"dense": {"trainng": {}}}}))
    with pytest.raises(ValueError, match=r"method 'dense' of made_up has unknown sections: trainng"):
        settings_of("made_up", "dense", 1, Store(folder, "made_up"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dense", "late"])
def test_a_real_run_gives_a_whole_record(tmp_path, method):
    task = json.loads((BENCHMARKS / "tasks" / "brown_lm_small.json").read_text())
    settings = settings_of("brown_lm_small", method, 1, Store(tmp_path, "brown_lm_small"))
    settings["training"] |= {"max_steps": 10, "warmup_steps": 2}
    settings["data"] = task["data"] | {"eval_blocks": 4}
    request = tmp_path / "settings.json"
    request.write_text(json.dumps(settings))
    subprocess.run([sys.executable, str(BENCHMARKS / "benchmark.py"), "one", str(request)], check=True)
    made = json.loads((tmp_path / "record.json").read_text())
    assert made["steps"] == sum(phase["steps"] for phase in made["phases"]) == 10
    assert [phase["kind"] for phase in made["phases"]] == (["dense"] if method == "dense" else ["factored", "dense"])
    assert 0 < made["value"] < 10
    assert made["flops"] == pytest.approx(sum(p["flops_per_step"] * p["steps"] for p in made["phases"]))
    assert made["cpu_seconds"] == pytest.approx(sum(p["cpu_seconds"] for p in made["phases"]))
