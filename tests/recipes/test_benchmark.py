"""The benchmark harness: which settings a run has, which records count, what the tables say."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import experiment
import methods
import plots
import pretrained_tasks
import pytest
import store
import tasks
import tiny
import torch
import transformers as T
from benchmark import Missing, settings_of
from image_models import new_image_classifier
from store import Store
from tables import print_table, rows
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_drt import DRTConfig, DynamicRank, find_targets
from hf_drt.forms import trainable_weights
from hf_drt.schedule import Run, Schedule

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

    def run_apart(settings, cache, core):
        method = "dense" if "drt_schedule" not in settings["training"] else "late"
        made.append((method, settings["seed"], settings["training"]["max_steps"]))
        return record(method, settings["seed"], Store(folder, "made_up"), seconds=10.0) | {"settings": settings}

    monkeypatch.setattr(benchmark, "run_apart", run_apart)
    command = ["run", "made_up", "--results", str(folder), "--methods", "dense_equal", "dense", "late", "--seeds", "1"]
    benchmark.main(command)
    # The last one is as long as 'late', which took as long as 'dense'; it had to wait for both.
    assert made == [("dense", 1, 100), ("late", 1, 100), ("dense", 1, 100)]
    assert "dense_equal, seed 1: waits for dense, seed 1" in capsys.readouterr().out
    benchmark.main(command)
    assert len(made) == 3


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
    # dense: 3 and 4, so 3.5 with a deviation of 0.7071; 2 * (20 + 40 + 10 + 30) seconds.
    out = capsys.readouterr().out
    assert "| late | 1.5000 ± 0.7071 | +2.8 σ | 2 | 0.62 |" in out  # a lower loss is better
    assert "0.06 hours of training in all." in out


def test_memory_is_told_by_phase(folder, capsys):
    results = Store(folder, "made_up")
    for seed in (1, 2):
        made = record("late", seed, results)
        sizes = {"parameter_bytes": 2**20, "gradient_bytes": 2**19, "optimizer_bytes": seed * 2**21}
        phases = [{"kind": "factored", "steps": 80, "peak_mib": 40.0 + seed}, {"kind": "dense", "steps": 20}]
        made["phases"] = [phases[0] | sizes, phases[1] | {"peak_mib": 70.0}]
        results.add("late", made)
    benchmark.main(["table", "made_up", "--memory", "--results", str(folder)])
    out = capsys.readouterr().out
    assert "| late | 0 factored | 80 | 1.0 | 0.5 | 3.0 | 4.5 | 42 |" in out
    assert "| late | 1 dense | 20 | – | – | – | – | 70 |" in out


# ---- grids


GRID = {"before": "factored", "after": "adapter", "I": [0, 40], "D": [40, 100], "training": {"drt_rank": 4}}


def test_a_grid_makes_a_method_of_each_window(folder):
    (folder / "tasks" / "made_up.json").write_text(json.dumps(TASK | {"grid": {"w": GRID}}))
    found = store.task_file("made_up")["methods"]
    made = {name: change["training"] for name, change in found.items() if name not in TASK["methods"]}
    assert {name: training["drt_schedule"] for name, training in made.items()} == {
        "w_0_40": "dense@0 adapter@40%", "w_0_100": "dense@0", "w_40_100": "factored@0 dense@40%",
    }  # fmt: skip
    assert all(training["drt_rank"] == 4 for training in made.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": "low"}, r"grid 'w' of made_up: before must be one of factored, adapter, lowrank, got 'low'"),
        ({"I": []}, r"I must be different whole numbers from 0 to 99, in % of the run, got \[\]"),
        ({"D": [0, 50]}, r"D must be different whole numbers from 1 to 100"),
        ({"D": [50, 50]}, r"got \[50, 50\]"),
        ({"I": [60], "D": [40]}, r"is empty: no I of \[60\] is below a D of \[40\]"),
        ({"E": 1}, "has unknown entries: E"),
    ],
)
def test_a_malformed_grid_is_named(folder, change, message):
    (folder / "tasks" / "made_up.json").write_text(json.dumps(TASK | {"grid": {"w": GRID | change}}))
    with pytest.raises(ValueError, match=message):
        store.task_file("made_up")


def test_a_grid_lacks_nothing_and_names_nothing_twice(folder):
    path = folder / "tasks" / "made_up.json"
    path.write_text(json.dumps(TASK | {"grid": {"w": {"before": "factored"}}}))
    with pytest.raises(ValueError, match="grid 'w' of made_up lacks D, I, after"):
        store.task_file("made_up")
    path.write_text(json.dumps(TASK | {"methods": {"dense": {}, "w_0_40": {}}, "grid": {"w": GRID}}))
    with pytest.raises(ValueError, match=r"both have w_0_40\. Rename one"):
        store.task_file("made_up")


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_matrices_have_a_rate_of_their_own(form, tmp_path):
    model = tiny.llama()
    names = list(find_targets(model).targets)
    trainer = tiny.trainer(tmp_path, model, drt_schedule=f"{form}@0", learning_rate=1e-3, max_steps=1)
    experiment.with_matrix_rate(trainer, names, 5e-2)
    trainer.train()
    matrices = {id(p) for name in names for p in trainable_weights(model.get_submodule(name))}
    for group in trainer.optimizer.param_groups:
        own = {id(p) in matrices for p in group["params"]}
        assert own in ({True}, {False})
        assert group["initial_lr"] == (5e-2 if own == {True} else 1e-3)


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "tasks").glob("*.json")), ids=lambda path: path.stem)
def test_every_task_file_has_settings_and_plans(path, tmp_path):
    results = Store(tmp_path, path.stem)
    for method, change in store.task_file(path.stem)["methods"].items():
        if longer := change.get("as_long_as", change.get("in_seconds_of")):
            assert longer in store.task_file(path.stem)["methods"]
            if "as_long_as" in change:
                continue
        if methods.tuned_as(path.stem, method):  # which waits for the trials
            training = methods.base_settings(path.stem, method)["training"]
        else:
            training = settings_of(path.stem, method, 1, results)["training"]
        config = DRTConfig(**{name[4:]: value for name, value in training.items() if name.startswith("drt_")})
        if config.schedule is not None:
            schedule = Schedule.parse(config.schedule)
            if schedule.uses_budget:
                assert config.rank is None or all(entry.rank != "budget" for entry in schedule.entries), method
            else:
                assert schedule.resolve(Run(training["max_steps"])).max_steps == training["max_steps"]


def test_settings_that_are_idle_in_a_method_are_left_out():
    common = {"max_steps": 3, "drt_rank_ratio": 0.125, "drt_factored_lr_scale": 0.5}
    assert experiment.used(common, tiny.llama()) == {"max_steps": 3}
    auto = common | {"drt_schedule": "auto"}
    assert experiment.used(auto, tiny.llama()) == {name: auto[name] for name in auto if name != "drt_rank_ratio"}
    fixed = common | {"drt_schedule": "fixed"}
    assert experiment.used(fixed, tiny.llama()) == fixed


VOCABULARY = {"vocab_size": 64, "pad_token_id": 0}
MODELS = {
    "brown_lm_wide": lambda model: T.LlamaForCausalLM(T.LlamaConfig(**VOCABULARY, **model)),
    "fashion_vit_wide": lambda model: new_image_classifier("vit", **model),
    "brown_tagger_wide": lambda model: T.ModernBertForTokenClassification(T.ModernBertConfig(**VOCABULARY, **model)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_default_of_the_tables_is_that_of_the_package(name):
    """By schedule and rank they are written out as what the preset comes to."""
    settings = methods.base_settings(name, "default")
    model = {key: value for key, value in settings["model"].items() if key != "family"}
    written = {key[4:]: value for key, value in settings["training"].items() if key.startswith("drt_")}
    plans = [
        DynamicRank(MODELS[name](model), DRTConfig(start="scratch", **own), 10)
        for own in (written, {"schedule": "auto"})
    ]
    forms, brought = ([drt.forms(0) for drt in plans], [drt.config.matrix_optimizer for drt in plans])
    assert forms[0] == forms[1]
    assert [len(drt.plan.phases) for drt in plans] == [1, 1]
    assert brought == ["muon", "muon"]


# ---- pictures


def with_curve(method: str, seed: int, results: Store, value: float) -> dict:
    curve = [{"cpu_seconds": x, "effective_rank": 9.0 - x / 10, "value": value} for x in (5.0, 10.0)]
    made = record(method, seed, results, value=value)
    made["phases"][0] |= {"kind": "dense", "cpu_seconds": 10.0}
    return made | {"curve": curve}


def test_pictures_are_drawn_from_records(folder, capsys):
    (folder / "tasks" / "made_up.json").write_text(json.dumps(TASK | {"grid": {"w": GRID}}))
    results = Store(folder, "made_up")
    for seed in (1, 2):
        for i, method in enumerate(("dense", "late", "narrow", "w_0_40", "w_40_100")):
            results.add(method, with_curve(method, seed, results, 1.0 + i / 1000))
    benchmark.main(["plot", "made_up", "--results", str(folder), "--output", str(folder / "png")])
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["made_up-quality.png", "made_up-rank.png", "made_up-w.png"]
    assert all((folder / "png" / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_a_run_that_is_evaluated_often_has_a_curve_of_its_loss(folder):
    results = Store(folder, "made_up")
    points = [{"cpu_seconds": float(i), "loss": 5.0 - i / 10} for i in range(plots.DRAWN)]
    often = record("late", 1, results, value=4.0) | {"curve": points}
    figure = plots.loss_over_time("made_up", {"late": [often], "dense": [with_curve("dense", 1, results, 1.0)]})
    (line,) = figure.axes[0].lines
    assert list(line.get_ydata()) == [point["loss"] for point in points]
    assert plots.loss_over_time("made_up", {"dense": [with_curve("dense", 1, results, 1.0)]}) is None


def test_labels_do_not_overlap(folder):
    results = Store(folder, "made_up")
    found = {f"method_{i}": [with_curve("dense", 1, results, 1.0 + i / 1e5)] for i in range(12)}
    figure = plots.quality("made_up", found)
    for panel in figure.axes:
        boxes = [text.get_window_extent() for text in panel.texts]
        assert len(boxes) == 12
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "has no record of made_up with seeds"),
        (["--methods", "magic"], "has no method 'magic'; it has dense"),
        (["--methods", "dense", "--except", "den*"], r"no method of made_up is left of dense without den\*"),
    ],
)
def test_pictures_of_nothing_are_refused(folder, flags, message):
    with pytest.raises(SystemExit, match=message):
        benchmark.main(["plot", "made_up", "--results", str(folder), "--output", str(folder / "png"), *flags])
    assert not (folder / "png").exists()


# ---- kinds of tasks, and what is measured


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"kind must be one of causal_lm, .*pretrained_lm, got 'poem'"):
        tasks.build("poem", {}, {}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "model", "message"),
    [
        ("text_classifier", {"dtype": "float32"}, "section model of a pretrained task has unknown entries: dtype"),
        ("pretrained_lm", {"dtype": "int8"}, "dtype must be float32 or bfloat16, got 'int8'"),
    ],
)
def test_a_pretrained_model_takes_no_other_settings(tmp_path, kind, model, message):
    with pytest.raises(ValueError, match=message):
        tasks.build(kind, model, {}, tmp_path)


def test_parameters_are_frozen_by_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    pretrained_tasks.frozen(model, r"^1\.|bias")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.weight"]
    with pytest.raises(ValueError, match="freeze='head' matches no parameter of Sequential"):
        pretrained_tasks.frozen(model, "head")


def test_a_record_holds_the_arguments_of_lora_that_were_given():
    pytest.importorskip("peft")
    given = {"r": 2, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    config = AutoConfig.for_model("bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    model = AutoModelForSequenceClassification.from_config(config)
    experiment.with_lora(model, ["query"], given)
    assert given == {"r": 2, "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}


def test_bytes_of_tensors_are_counted_inside_of_objects():
    state = {"a": {"step": 3, "exp_avg": torch.zeros(5), "projector": SimpleNamespace(matrix=torch.zeros(2, 3))}}
    assert experiment.tensor_bytes([state, None, [torch.zeros(4, dtype=torch.bfloat16)]]) == 5 * 4 + 6 * 4 + 4 * 2


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
