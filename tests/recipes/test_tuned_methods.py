"""Methods whose learning rates are tuned, and lengths that are fitted to another method's seconds."""

import json
import threading

import benchmark
import methods
import pilot
import pytest
import store
from benchmark import Missing, settings_of
from store import Store
from tuned_plots import tuned_quality
from tuned_tables import SUMMARY, print_rates, print_tuned, rows_of, summary_rows

TUNED = {"training": {"drt_schedule": "fixed"}, "rate": "matrix_rate", "matrices": [0.2, 0.1], "others": [0.01, 0.03]}
TASK = {
    "kind": "causal_lm",
    "model": {"hidden_size": 64},
    "data": {"block_size": 32},
    "training": {"max_steps": 100, "warmup_steps": 10, "learning_rate": 1e-3},
    "measure": {"points": 2},
    "tuned": {"share": 0.25, "methods": {"pair": TUNED, "dense": TUNED | {"training": {}, "label": "dense, AdamW"}}},
    "methods": {
        "dense_in_pair": {"like": "dense", "in_seconds_of": "pair"},
        "pair_in_dense": {"like": "pair", "in_seconds_of": "dense", "times": 0.5},
        "pair_calm": {
            "like": "pair",
            "training": {"drt_matrix_momentum": 0.9},
            "timed_as": "pair",
            "in_seconds_of": "pair",
        },
        "pair_window": {"like": "pair", "training": {"drt_schedule": "factored@0 dense@80%"}, "in_seconds_of": "pair"},
    },
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The records of the one task 'made_up'."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "made_up.json").write_text(json.dumps(TASK))
    monkeypatch.setattr(store, "HERE", tmp_path)
    return Store(tmp_path, "made_up")


def record(method: str, seed: int, results: Store, loss: float = 1.0, **more: object) -> dict:
    settings = settings_of("made_up", method, seed, results)
    steps = settings["training"]["max_steps"]
    return {
        "settings": settings, "value": loss, "seconds": 20.0, "cpu_seconds": 10.0, "flops": 5.0, "steps": steps,
        "phases": [{"trainable": 10, "steps": steps, "peak_mib": 50.0}], "curve": [{"loss": loss, "accuracy": 0.5}],
    } | more  # fmt: skip


def with_losses(results: Store, losses: dict[str, float]) -> None:
    for method, loss in losses.items():
        results.add(method, record(method, 1, results, loss))


def tried(results: Store, method: str, best: str) -> None:
    """All trials of a method, of which one is the best."""
    names = [f"{method}_m{m:g}_o{o:g}" for m in TUNED["matrices"] for o in TUNED["others"]]
    with_losses(results, {name: 1.5 if name == best else 2.0 for name in names})


def timed(results: Store, pilot: str | None = None, **phases: list[tuple[int, float]]) -> None:
    """A pilot's records: (steps, seconds of one) of each phase."""
    for method, found in phases.items():
        settings = methods.pilot_settings("made_up", method)
        made = [{"kind": "dense", "steps": steps, "step_seconds": seconds} for steps, seconds in found]
        methods.pilot_store("made_up", results).add(method, {"pilot": pilot, "settings": settings, "phases": made})


def test_every_pair_of_rates_is_tried_and_the_best_is_taken(results, capsys):
    own = {"max_steps": 25, "warmup_steps": 10, "drt_schedule": "fixed"}
    trial = settings_of("made_up", "pair_m0.2_o0.01", 2, results)
    assert trial["training"] == own | {"learning_rate": 0.01, "matrix_rate": 0.2}
    assert trial["measure"] == {"points": 1}
    with_losses(results, {"pair_m0.2_o0.01": 2.5, "pair_m0.2_o0.03": 2.25, "pair_m0.1_o0.03": 1.75})
    with pytest.raises(Missing, match=r"pair_m0\.1_o0\.01, seed 1"):
        settings_of("made_up", "pair", 2, results)
    with_losses(results, {"pair_m0.1_o0.01": 1.5})
    best = settings_of("made_up", "pair", 2, results)["training"]
    assert best == own | {"max_steps": 100, "learning_rate": 0.01, "matrix_rate": 0.1}
    print_rates("made_up", results, [2])
    assert capsys.readouterr().out.splitlines() == [
        "| pair | 0.01 | 0.03 |", "|---|---|---|", "| 0.1 | **1.500** | 1.750 |", "| 0.2 | 2.500 | 2.250 |", "",
    ]  # fmt: skip


def test_a_part_of_the_grid_can_be_named(results, capsys):
    changed = json.loads(json.dumps(TASK))
    changed["tuned"]["methods"]["pair"]["pairs"] = [[0.2, 0.01], [0.1, 0.03]]
    (store.HERE / "tasks" / "made_up.json").write_text(json.dumps(changed))
    with_losses(results, {"pair_m0.2_o0.01": 2.5, "pair_m0.1_o0.03": 1.75})
    assert settings_of("made_up", "pair", 1, results)["training"]["matrix_rate"] == 0.1
    print_rates("made_up", results, [1])
    assert "| 0.1 | – | **1.750** |\n| 0.2 | 2.500 | – |" in capsys.readouterr().out


def test_a_method_like_a_tuned_one_has_its_rates(results):
    tried(results, "pair", "pair_m0.1_o0.03")
    timed(results, pair=[(20, 1.0)], pair_window=[(16, 1.0), (4, 6.0)])
    training = settings_of("made_up", "pair_window", 3, results)["training"]
    assert (training["learning_rate"], training["matrix_rate"]) == (0.03, 0.1)
    assert training["drt_schedule"] == "factored@0 dense@80%"
    assert training["max_steps"] == round(100 / ((16 + 4 * 6) / 20))


def test_lengths_are_fitted_to_the_seconds_of_a_pilot(results):
    tried(results, "pair", "pair_m0.1_o0.03")
    tried(results, "dense", "dense_m0.2_o0.01")
    with pytest.raises(Missing, match=r"the pilot of pair: benchmark\.py pilot made_up"):
        settings_of("made_up", "dense_in_pair", 1, results)
    timed(results, pair=[(20, 0.5)])
    with pytest.raises(Missing, match=r"the pilot of dense: benchmark\.py pilot made_up"):
        settings_of("made_up", "dense_in_pair", 1, results)
    timed(results, dense=[(20, 1.25)])
    lengths = {}
    for method in ("pair", "dense", "dense_in_pair", "pair_in_dense", "pair_calm"):
        training = settings_of("made_up", method, 1, results)["training"]
        lengths[method] = training["max_steps"], training["warmup_steps"]
    fitted = {"dense_in_pair": (40, 10), "pair_in_dense": (125, 10), "pair_calm": (100, 10)}
    assert lengths == {"pair": (100, 10), "dense": (100, 10)} | fitted


def test_a_pilot_counts_while_the_steps_are_the_same(results, monkeypatch):
    timed(results, pair=[(20, 0.5)])
    assert methods.step_seconds("made_up", "pair_in_dense", results) == 0.5
    assert methods.step_seconds("made_up", "pair_m0.1_o0.03", results) == 0.5
    changed = json.loads(json.dumps(TASK))
    changed["model"]["hidden_size"] = 128
    (store.HERE / "tasks" / "made_up.json").write_text(json.dumps(changed))
    with pytest.raises(Missing, match="the pilot of pair"):
        methods.step_seconds("made_up", "pair", results)


def test_a_later_pilot_is_told_in_the_seconds_of_the_first(results):
    timed(results, pair=[(20, 0.5)], dense=[(20, 1.0)])
    timed(results, pilot="later, on a machine half as fast", pair_window=[(16, 1.0), (4, 6.0)], dense=[(20, 2.0)])
    seconds = {m: methods.step_seconds("made_up", m, results) for m in ("pair", "dense", "pair_window")}
    assert seconds == {"pair": 0.5, "dense": 1.0, "pair_window": 0.5 * (16 + 4 * 6) / 20}


def test_a_pilot_times_what_none_has_timed_and_dense_beside_it(results, monkeypatch, capsys):
    made: list[list[str]] = []

    def measured(commands, answers):
        made.append(sorted(commands))
        for method in commands:
            settings = methods.pilot_settings("made_up", method)
            yield method, {"settings": settings, "phases": [{"kind": "dense", "steps": 20, "step_seconds": 1.0}]}

    monkeypatch.setattr(pilot, "measured", measured)
    timed(results, pair=[(20, 0.5)], dense=[(20, 1.0)])
    command = ["pilot", "made_up", "--results", str(results.path.parent)]
    benchmark.main(command)
    assert made == [["dense", "pair_window"]]
    benchmark.main(command)
    assert len(made) == 1
    assert "made_up: all have been timed; delete their lines" in capsys.readouterr().out
    kept = methods.pilots("made_up", "dense", Store(results.path.parent, "made_up"))
    assert [record["pilot"] is None for record in kept] == [True, False]


def test_a_method_of_many_phases_has_a_longer_pilot(results):
    tuned = TASK["tuned"] | {"methods": TASK["tuned"]["methods"] | {"pair": TUNED | {"pilot_steps": 60}}}
    (store.HERE / "tasks" / "made_up.json").write_text(json.dumps(TASK | {"tuned": tuned}))
    steps = {m: methods.pilot_settings("made_up", m)["training"]["max_steps"] for m in ("pair", "pair_window", "dense")}
    assert steps == {"pair": 60, "pair_window": 60, "dense": 20}


def test_trials_are_made_with_one_seed_before_what_waits_for_them(results, monkeypatch):
    timed(results, pair=[(20, 0.5)], dense=[(20, 1.25)])
    made, lock = [], threading.Lock()

    def one(settings, cache, core):
        training = settings["training"]
        with lock:
            made.append((settings["seed"], training["max_steps"], core))
        row = {"loss": training["matrix_rate"] + training["learning_rate"], "accuracy": 0.5}
        phase = {"trainable": 10, "steps": training["max_steps"], "peak_mib": 50.0}
        return {"settings": settings, "value": 1.0, "seconds": 2.0, "cpu_seconds": 1.0, "flops": 5.0,
                "steps": training["max_steps"], "phases": [phase], "curve": [row]}  # fmt: skip

    monkeypatch.setattr(benchmark, "run_apart", one)
    monkeypatch.setattr(benchmark.os, "cpu_count", lambda: 2)
    arguments = ["run", "made_up", "--seeds", "1", "2", "--results", str(results.path.parent), "--jobs", "2"]
    benchmark.main(arguments)
    assert sorted(made[:8])[0][:2] == (1, 25)
    assert {(seed, steps) for seed, steps, _ in made[:8]} == {(1, 25)}
    assert sorted((steps, seed) for seed, steps, _ in made[8:]) == sorted(
        (steps, seed) for steps in (100, 100, 40, 125, 100) for seed in (1, 2)
    )  # the window waits for a pilot of its own
    assert {core for *_, core in made} == {0, 1}


def test_the_table_counts_the_seconds_of_the_pilot(results, capsys):
    for method in ("pair", "dense"):
        tried(results, method, f"{method}_m0.1_o0.03")
    timed(results, pair=[(20, 0.5)])
    for seed, loss in ((1, 1.25), (2, 1.35)):
        results.add("pair", record("pair", seed, results, loss, probe={"minimal_pairs": 0.5 + seed / 10}))
    results.add("dense", record("dense", 1, results, 1.5, probe={"minimal_pairs": 0.5}))
    print_tuned("made_up", results, [1, 2])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "| made_up | loss | accuracy | minimal pairs | seconds | of dense AdamW's | steps | rates | seeds |"
    )
    assert "| pair | 1.300 ± 0.071 | 0.500 ± 0.000 | 0.650 ± 0.071 | 50 | – | 100 | 0.1, 0.03 | 2 |" in lines
    assert lines[-1] == "0.03 hours of computing for all runs of the task, trials among them."
    assert "| dense, AdamW | 1.500 | 0.500 | 0.500 | (10) | – | 100 | 0.1, 0.03 | 1 |" in lines
    timed(results, dense=[(20, 1.25)])
    benchmark.main(["table", "made_up", "--seeds", "1", "2", "--results", str(results.path.parent)])
    assert "| 50 | 0.40 | 100 |" in capsys.readouterr().out


def test_a_table_shows_the_methods_that_are_named(results, capsys):
    for method in ("pair", "dense"):
        tried(results, method, f"{method}_m0.1_o0.03")
        results.add(method, record(method, 1, results))
    timed(results, pair=[(20, 0.5)], dense=[(20, 1.25)])
    results.add("dense_in_pair", record("dense_in_pair", 1, results))
    for flags, shown in (
        (["--methods", "pair", "*_in_pair"], {"pair", "dense_in_pair"}),
        (["--except", "*_in_pair"], {"pair", "dense, AdamW"}),
        (["--methods", "*pair*", "--except", "dense*"], {"pair"}),
        (["--methods", "pair_m0.1_o0.03"], {"pair_m0.1_o0.03"}),  # a trial, by its name alone
    ):
        benchmark.main(["table", "made_up", "--seeds", "1", "--results", str(results.path.parent), *flags])
        lines = [line for line in capsys.readouterr().out.splitlines()[2:] if line.startswith("| ")]
        assert {line.split(" | ")[0].strip("| ") for line in lines} == shown
        assert all(" | 0.40 | " in line for line in lines if line.startswith("| pair | "))  # of dense, shown or not


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"share": 0}, r"tuned of made_up: share must be in \(0, 1\], got 0"),
        ({"share": 0.5, "methods": {"a": {"rate": "x"}}}, r"tuned method 'a' of made_up lacks matrices, others, train"),
        ({"share": 0.5, "methods": {"a": TUNED | {"lr": 1}}}, r"tuned method 'a' of made_up has unknown entries: lr"),
        ({"share": 0.5, "methods": {"a": TUNED | {"others": [1, 1]}}}, r"others must be different rates above 0, got"),
        ({"share": 0.5, "methods": {"a": TUNED | {"matrices": []}}}, r"matrices must be different rates above 0, got"),
        ({"share": 0.5, "methods": {"a": TUNED | {"pairs": [[9, 0.01]]}}}, "pairs must be of matrices and others"),
    ],
)
def test_malformed_rates_are_named(results, section, message):
    (store.HERE / "tasks" / "made_up.json").write_text(json.dumps(TASK | {"tuned": section}))
    with pytest.raises(ValueError, match=message):
        store.task_file("made_up")


def test_unknown_extras_are_named(results):
    changed = TASK | {"methods": {"odd": {"like": "pair", "extras": {"magic": 1}}}}
    (store.HERE / "tasks" / "made_up.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="method 'odd' of made_up has unknown extras: magic"):
        settings_of("made_up", "odd", 1, results)


@pytest.mark.parametrize("jobs", [0, 100_000])
def test_runs_at_a_time_are_as_many_as_cores(results, jobs):
    with pytest.raises(SystemExit, match=rf"--jobs must be from 1 to \d+, the cores of this machine, got {jobs}"):
        benchmark.main(["run", "made_up", "--results", str(results.path.parent), "--jobs", str(jobs)])


def test_the_accuracy_of_a_classifier_is_its_value(results, capsys):
    (store.HERE / "tasks" / "made_up.json").write_text(json.dumps(TASK | {"kind": "image_classifier"}))
    tried(results, "pair", "pair_m0.1_o0.03")
    results.add("pair", record("pair", 1, results, 0.5) | {"value": 0.8, "curve": [{"loss": 0.5}]})
    print_tuned("made_up", results, [1])
    assert "| pair | 0.500 | 0.800 |" in capsys.readouterr().out


def test_the_summary_shows_one_metric_of_each_method_that_was_run(results):
    tried(results, "pair", "pair_m0.1_o0.03")
    tried(results, "dense", "dense_m0.1_o0.03")
    for seed, loss in ((1, 1.25), (2, 1.35)):
        results.add("dense", record("dense", seed, results, loss, probe={"minimal_pairs": 0.5 + seed / 10}))
    titles = {"made_up": ("a task", "loss")}, {"made_up": ("a task", "minimal_pairs")}
    by_loss, by_pairs = (list(summary_rows(names, results.path.parent, [1, 2])) for names in titles)
    assert by_loss == [("a task", "1.300 ± 0.071", *["–"] * (len(SUMMARY) - 1))]
    assert by_pairs == [("a task", "0.650 ± 0.071", *["–"] * (len(SUMMARY) - 1))]


def test_the_picture_has_a_panel_per_metric_and_the_methods_that_were_in_the_pilot(results):
    for method in ("pair", "dense"):
        tried(results, method, f"{method}_m0.1_o0.03")
        results.add(method, record(method, 1, results, probe={"minimal_pairs": 0.5}))
    assert tuned_quality("made_up", rows_of("made_up", results, [1])) is None
    timed(results, pair=[(20, 0.5)])
    figure = tuned_quality("made_up", rows_of("made_up", results, [1]))
    assert [panel.get_ylabel() for panel in figure.axes] == ["loss", "accuracy", "minimal pairs"]
    assert [[text.get_text() for text in panel.texts] for panel in figure.axes] == [["pair"]] * 3
    timed(results, dense=[(20, 1.25)])
    both = tuned_quality("made_up", rows_of("made_up", results, [1]))
    assert {text.get_text() for text in both.axes[0].texts} == {"pair", "dense"}
    rows = rows_of("made_up", results, [1])
    many = tuned_quality("made_up", {f"{method}_{i}": row for i in range(10) for method, row in rows.items()})
    assert [panel.get_xlabel() for panel in many.axes] == ["loss", "accuracy", "minimal pairs"]
    shown = [text.get_text() for text in many.axes[0].get_yticklabels()]
    assert len(shown) == 20
    assert set(shown) == {"pair  (50 s)", "dense, AdamW  (125 s)"}
    only = tuned_quality("made_up", rows_of("made_up", results, [1]), ["dense"])
    assert [text.get_text() for text in only.axes[0].texts] == ["dense"]


def test_plots_leave_out_the_trials(results, tmp_path):
    tried(results, "pair", "pair_m0.1_o0.03")
    point = {"cpu_seconds": 5.0, "effective_rank": 3.0, "loss": 1.0, "accuracy": 0.5}
    phases = [{"kind": "factored", "cpu_seconds": 5.0}]
    results.add("pair", record("pair", 1, results, curve=[point, point], phases=phases))
    timed(results, pair=[(20, 0.5)])
    benchmark.main(["plot", "made_up", "--seeds", "1", "--results", str(tmp_path), "--output", str(tmp_path / "p")])
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["made_up-quality.png", "made_up-rank.png"]
