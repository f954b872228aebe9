"""Reading a run folder: numbers against the log itself, the time of every point, and what is refused."""

import json
import shutil

import folders
import pytest

from hf_drt.report import RunError, read_runs
from hf_drt.report.run_data import distinct_names


def read(folder):
    (run,) = read_runs([folder])
    return run


def without(rows, *keys):
    return [{k: v for k, v in row.items() if k not in keys} for row in rows]


def at(series):
    return [(point.step, point.seconds) for point in series]


def test_points_between_two_rows_that_tell_the_time_are_interpolated(tmp_path):
    run = read(folders.dynamic_run(tmp_path / "run"))
    # 1 s of switch, 1 s a step; at step 10 before the switch, which ends at 13 s; then 0.5 s a step.
    assert at(run.series["loss"]) == [(5, 6.0), (10, 11.0), (15, 15.5), (20, 18.0)]
    assert [(p.begin, p.finish) for p in run.phases] == [(1.0, 11.0), (13.0, 18.0)]
    assert (run.clock.source, run.clock.total) == ("measured", 18.0)


@pytest.mark.parametrize("kept", [0, 4])
def test_a_log_without_drt_seconds_gives_the_same_times(tmp_path, kept):
    """Written by a version without them, in whole or up to a resume: then its seconds begin anew."""
    rows = folders.rows()
    resumed = [
        {**row, "drt_seconds": row["drt_seconds"] - 12.0} if "drt_seconds" in row else row for row in rows[kept:]
    ]
    rows = without(rows[:kept], "drt_seconds") + (resumed if kept else without(rows, "drt_seconds"))
    folders.write_plan(tmp_path / "checkpoint-20")
    run = read(folders.write_log(tmp_path, rows))
    assert at(run.series["loss"]) == [(5, 6.0), (10, 11.0), (15, 15.5), (20, 18.0)]


def test_a_phase_that_was_stopped_and_resumed_is_counted_once(tmp_path):
    rows = without(folders.rows(), "drt_seconds")
    stopped = {"step": 4, "drt_phase": 0, "drt_phase_steps": 4, "drt_phase_seconds": 4.0}
    rows.insert(1, stopped)
    folders.write_plan(tmp_path / "checkpoint-20")
    assert read(folders.write_log(tmp_path, rows)).clock.total == 18.0


def test_windows_that_began_after_the_checkpoint_are_in_the_log(tmp_path):
    folders.write_plan(tmp_path / "checkpoint-4", "factored@0", step=4, phase=0, windows={"trace": []})
    run = read(folders.write_log(tmp_path, folders.rows()))
    assert [(p.kind, p.start, p.end) for p in run.phases] == [("factored", 0, 10), ("dense", 10, 20)]
    folders.write_plan(tmp_path / "checkpoint-4", "factored@0 dense@4 factored@8 dense@12", step=4, windows={})
    with pytest.raises(RunError, match="are of different runs"):
        read(tmp_path)


def test_a_plain_run_has_its_runtime_less_the_evaluations_in_it(tmp_path):
    run = read(folders.plain_run(tmp_path / "run"))
    assert at(run.series["loss"]) == [(5, 10.0), (20, 40.0)]  # 50 s - 4 s - 6 s
    assert run.clock.source == "runtime"
    assert not run.dynamic
    assert run.plan is None


def test_a_run_that_tells_no_time_has_none(tmp_path):
    rows = [{"step": 5, "loss": 4.0}, {"step": 10, "loss": 3.0}]
    run = read(folders.write_log(tmp_path, rows))
    assert at(run.series["loss"]) == [(5, None), (10, None)]
    assert run.clock.total is None


def test_phases_and_switches_have_what_was_logged_in_them(tmp_path):
    run = read(folders.dynamic_run(tmp_path / "run"))
    first, second = run.phases
    assert (first.kind, first.start, first.end, first.steps, first.seconds) == ("factored", 0, 10, 10, 10.0)
    assert (first.tokens_per_second, first.samples_per_second, first.peak_memory) == (80.0, 8.0, 64.0)
    assert (first.trainable, first.effective_rank) == (100, 5.5)
    assert (second.kind, second.start, second.end, second.trainable) == ("dense", 10, 20, 300)
    assert [(s.step, s.phase, s.seconds, s.function_error) for s in run.switches] == [
        (0, 0, 1.0, None),
        (10, 1, 2.0, 0.125),
    ]
    assert (run.step, run.max_steps, run.plan, run.planned) == (20, 20, "factored@0 dense@10", 2)


def test_a_trained_run_is_read_as_it_was_logged(trained):
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    run = read(trained)
    assert run.plan == "factored@0 dense@8 adapter@16"
    assert [phase.kind for phase in run.phases] == ["factored", "dense", "adapter"]
    for key in ("loss", "eval_loss", "learning_rate", "grad_norm"):
        logged = [(row["step"], row[key]) for row in history if key in row]
        assert [(p.step, p.value) for p in run.series[key]] == logged
        assert len(logged) >= 3
    ends = [row for row in history if "drt_phase_seconds" in row]
    assert [phase.seconds for phase in run.phases] == [row["drt_phase_seconds"] for row in ends]
    spent = sum(row.get("drt_phase_seconds", 0.0) + row.get("drt_switch_seconds", 0.0) for row in history)
    assert run.clock.total == pytest.approx(spent, abs=1e-3)
    times = [point.seconds for point in run.series["loss"]]
    assert times == sorted(times)
    for phase in run.phases:  # no point of a phase lies outside of its time
        inside = [p.seconds for p in run.series["loss"] if phase.start < p.step <= phase.end]
        assert phase.begin <= min(inside) <= max(inside) <= phase.finish


def test_ranks_stand_in_the_order_of_the_model(tmp_path, trained):
    state = json.loads((trained / "checkpoint-20" / "drt_state.json").read_text())
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    ranks = read(trained).ranks
    assert list(ranks.layers) == list(state["layers"])
    by_step = {row["step"]: row for row in history if "drt_effective_rank_mean" in row}
    assert ranks.steps == tuple(by_step) == (4, 8, 12, 16, 20)
    for layer, values in zip(ranks.layers, ranks.values, strict=True):
        assert list(values) == [row[f"drt_effective_rank/{layer}"] for row in by_step.values()]
    # Without a checkpoint numbers are sorted by size: the log has layer 10 before layer 2.
    run = read(folders.write_log(tmp_path, folders.rows()))
    assert [name.split(".")[2] for name in run.ranks.layers] == ["0", "0", "2", "2", "10", "10"]


def test_a_layer_that_was_not_measured_once_has_a_gap(tmp_path):
    rows = folders.rows()
    del rows[2][f"drt_effective_rank/{folders.LAYERS[3]}"]
    run = read(folders.write_log(tmp_path, rows))
    assert run.ranks.values[run.ranks.layers.index(folders.LAYERS[3])] == (None, 8.0)


def test_without_a_checkpoint_the_forms_are_unknown(tmp_path):
    run = read(folders.write_log(tmp_path, folders.rows()))
    assert [phase.label for phase in run.phases] == ["phase 0", "phase 1"]
    assert [(phase.start, phase.end) for phase in run.phases] == [(0, 10), (10, 20)]


def test_the_phase_in_progress_is_read_from_the_checkpoint(trained):
    run = read(trained / "checkpoint-10")
    meter = json.loads((trained / "checkpoint-10" / "drt_state.json").read_text())["meter"]
    assert (run.name, run.step, run.max_steps, run.planned) == ("tiny/checkpoint-10", 10, 20, 3)
    assert [(phase.kind, phase.end, phase.steps) for phase in run.phases] == [("factored", 8, 8), ("dense", 10, 2)]
    assert run.phases[1].seconds == meter["seconds"]
    assert run.phases[1].tokens_per_second == pytest.approx(2 * 64 / meter["seconds"])
    assert run.clock.total == pytest.approx(read(trained).phases[1].begin + meter["seconds"], abs=1e-3)
    assert run.series["loss"][-1].seconds == pytest.approx(run.clock.total)


def test_the_log_of_the_furthest_step_is_read(tmp_path):
    early, late = folders.rows()[:4], folders.rows()
    folders.write_plan(folders.write_log(tmp_path / "checkpoint-10", early), step=10)
    folders.write_plan(folders.write_log(tmp_path / "checkpoint-20", late), step=20)
    assert read(tmp_path).step == 20
    folders.write_log(tmp_path, early)  # the folder's own is of an earlier time
    assert read(tmp_path).series["eval_loss"][-1].value == 2.0
    folders.write_log(tmp_path, folders.rows(final=1.5))  # of the same step, but written after the end
    assert read(tmp_path).series["eval_loss"][-1].value == 1.5


def test_a_state_that_an_earlier_run_has_left_does_not_make_a_plain_run_dynamic(tmp_path):
    folders.write_plan(folders.plain_run(tmp_path) / "checkpoint-20")
    run = read(tmp_path)
    assert (run.phases, run.plan) == ((), None)


def test_names_are_the_shortest_that_differ(tmp_path):
    paths = [tmp_path / name for name in ("a/out", "b/out", "c/other", "b/out/checkpoint-5")]
    assert distinct_names(paths) == ["a/out", "b/out", "other", "out/checkpoint-5"]
    assert distinct_names([tmp_path / "out" / "checkpoint-5", tmp_path / "b" / "out" / "checkpoint-5"]) == [
        f"{tmp_path.name}/out/checkpoint-5",
        "b/out/checkpoint-5",
    ]


# ---- what is refused


def broken(folder, text):
    folder.mkdir()
    (folder / "trainer_state.json").write_text(text)
    return folder


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(RunError, match=r"there is no folder .*nowhere\. A run is a Trainer's output_dir with a"):
        read(tmp_path / "nowhere")


def test_a_file(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text("{}")
    with pytest.raises(RunError, match=r"trainer_state\.json is a file, not the folder of a run"):
        read(path)


def test_a_folder_without_a_run_names_those_in_it(tmp_path):
    with pytest.raises(
        RunError, match=r"is not a run: neither it nor a checkpoint-N in it has trainer_state\.json\. .*\.$"
    ):
        read(tmp_path)
    folders.plain_run(tmp_path / "first")
    folders.write_log(tmp_path / "second" / "checkpoint-20", folders.rows())
    with pytest.raises(RunError, match=r"Runs in it: first, second\."):
        read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"log_history": [{"lo',
            r"is damaged \(Unterminated string.* Give one of the run's checkpoints that is whole",
        ),
        ("[]", r"is damaged \(no log_history, or no global_step\)"),
        ('{"log_history": []}', r"is damaged \(no log_history, or no global_step\)"),
        ('{"global_step": 5, "log_history": [{"loss": 1.0}]}', r"is damaged \(a row of log_history has no step\)"),
        (
            '{"global_step": 5, "log_history": []}',
            r"has no logged rows: nothing to show\. Train with logging_steps set",
        ),
    ],
)
def test_a_damaged_log(tmp_path, text, message):
    with pytest.raises(RunError, match=message):
        read(broken(tmp_path / "run", text))


def test_a_state_of_a_newer_format(tmp_path):
    folder = folders.dynamic_run(tmp_path)
    path = folder / "checkpoint-20" / "drt_state.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(
        RunError, match=r"cannot report on .*format version 2; this hf_drt reads 1 to 1\. Upgrade hf_drt"
    ):
        read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"plan": "sparse@0"},
            r"the plan 'sparse@0' \(of 20 steps\) in .* cannot be read: 'sparse' in 'sparse@0' is not a form",
        ),
        ({"plan": None}, r"the plan None .* cannot be read: it needs a text under 'plan'"),
        ({"max_steps": "many"}, r"\(of 'many' steps\) .* a whole number under 'max_steps'"),
        ({"plan": "factored@0 dense@30"}, r"cannot be read: .*30"),
    ],
)
def test_a_plan_that_cannot_be_read(tmp_path, changes, message):
    folders.dynamic_run(tmp_path)
    folders.write_plan(tmp_path / "checkpoint-20", **changes)
    with pytest.raises(RunError, match=message):
        read(tmp_path)


@pytest.mark.parametrize("plan", ["factored@0 dense@12", "factored@0"])
def test_files_of_two_runs(tmp_path, plan):
    folders.dynamic_run(tmp_path)
    folders.write_plan(tmp_path / "checkpoint-20", plan=plan)
    with pytest.raises(RunError, match=rf"are of different runs: .* phase 1 began at step 10; the .* plan is '{plan}'"):
        read(tmp_path)


def test_one_run_twice_or_none(tmp_path):
    folder = folders.plain_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"run/\.\./run is given twice"):
        read_runs([folder, tmp_path / "run" / ".." / "run"])
    with pytest.raises(RunError, match=r"no run was given\. Give at least one RUN_DIR"):
        read_runs([])


def test_all_runs_are_read_before_one_is_shown(tmp_path):
    whole = folders.plain_run(tmp_path / "whole")
    shutil.copytree(whole, tmp_path / "cut")
    (tmp_path / "cut" / "trainer_state.json").write_text("{")
    with pytest.raises(RunError, match=r"cut/trainer_state\.json is damaged"):
        read_runs([whole, tmp_path / "cut"])


def test_the_dtype_of_a_phase_is_in_its_label(tmp_path):
    folders.write_plan(tmp_path / "checkpoint-20", "factored:4/bf16@0 dense/fp32@10")
    run = read(folders.write_log(tmp_path, folders.rows()))
    assert [(phase.label, phase.numbered) for phase in run.phases] == [
        ("factored:4/bf16", "0 factored:4/bf16"), ("dense/fp32", "1 dense/fp32"),
    ]  # fmt: skip
