"""``hf-drt plan --processes``."""

import json

import pytest
import tiny
import torch

from hf_drt import DRTConfig, DynamicRank
from hf_drt.simulate import LAYOUTS, MACHINES, batch_spec, estimate_run, layout_for, on_processes

SMALL = ("--batch-size", 2, "--seq-length", 8, "--rank", 4, "--schedule", "factored@0 dense@40%", "--steps", 100)
TABLE = {
    "name": "ours", "origin": "measured", "source": "our own runs", "devices": 4, "flops": {"float32": 1e13},
    "decomposition": 1e10, "node": {"bandwidth": 1e11, "latency": 1e-6},
    "network": {"bandwidth": 1e10, "latency": 5e-6},
}  # fmt: skip


QUICK = ("ddp", "hsdp", "zero3")


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_the_numbers_are_those_of_the_estimate(hf_drt, configured, engine):
    shards = ("--shards", 8) if engine == "hsdp" else ()
    result = hf_drt("plan", configured(), *SMALL, "--processes", 16, "--engine", engine, *shards, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)["processes"]
    with torch.device("meta"):
        model = tiny.llama()
    controller = DynamicRank(model, DRTConfig(schedule="factored@0 dense@40%", rank=4), max_steps=100)
    run = estimate_run(controller, batch_spec(model, 2, 8), optimizer="adamw_torch_fused")
    layout = layout_for(engine, 16, shards=8 if shards else None)
    expected = on_processes(
        controller, [p.step for p in run.phases], run.dense, layout, MACHINES["h100"], optimizer="adamw_torch_fused",
        accumulation=1, dtype="float32",
    )  # fmt: skip
    for mine, theirs in zip([*data["phases"], data["dense"]], [*expected.phases, expected.dense], strict=True):
        assert mine["sent"] == theirs.sent
        assert mine["sent_total"] == theirs.total > 0
        assert (mine["weights"], mine["optimizer"], mine["peak"]) == (
            theirs.held.weights, theirs.optimizer, theirs.peak
        )  # fmt: skip
    assert [[s["processes"] for s in costs] for costs in data["switches"]] == [[1, 8, 16]] * 2
    assert data["switches"][0][-1]["seconds"] == expected.switches[0][-1].seconds
    assert (data["engine"], data["count"], data["machine"]["origin"]) == (engine, 16, "assumed")


def test_tables_tell_memory_traffic_and_switches(hf_drt, configured):
    out = hf_drt("plan", configured(), *SMALL, "--processes", 512, "--engine", "fsdp2").out
    assert "512 processes, fsdp2; 64 nodes of 8 h100" in out
    assert "speeds: assumed (NVIDIA H100 SXM and DGX H100 data sheets; latencies and decompositions guessed)" in out
    assert "each h100 has 76,294, enough for all phases" in out
    lines = out.splitlines()
    rows = [line.split() for line in lines[next(i for i, x in enumerate(lines) if x.startswith("into")) + 1 :][:8]]
    assert [(row[0], row[2]) for row in rows] == [(p, n) for p in "01" for n in ("1", "8", "64", "512")]
    assert [row[4] for row in rows[:4]] == ["14", "2", "1", "1"]
    assert (
        "hsdp, 8 shards a replica"
        in hf_drt("plan", configured(), *SMALL, "--processes", 16, "--engine", "hsdp", "--shards", 8).out
    )


def test_what_does_not_fit_into_a_device_is_told(hf_drt, configured, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(TABLE | {"memory_gb": 0.0001}))
    out = hf_drt("plan", configured(), *SMALL, "--processes", 8, "--links", tmp_path / "own.json").out
    assert "each ours has 0.1, too much in phase 0, 1" in out
    assert "speeds: measured (our own runs)" in out


def test_faster_links_take_less_time_for_the_same_bytes(hf_drt, configured, tmp_path):
    slow = TABLE | {"node": {"bandwidth": 1e6, "latency": 1e-6}}
    seen = []
    for table in (TABLE, slow):
        (tmp_path / "own.json").write_text(json.dumps(table))
        wanted = ("plan", configured(), *SMALL, "--processes", 4, "--links", tmp_path / "own.json", "--json")
        seen.append(json.loads(hf_drt(*wanted).out)["processes"]["phases"][0])
    assert seen[0]["sent"] == seen[1]["sent"]
    assert seen[0]["communication_seconds"] < seen[1]["communication_seconds"]
    assert seen[0]["compute_seconds"] == seen[1]["compute_seconds"]


def test_a_global_batch_gives_the_accumulation(hf_drt, configured):
    def dense(*flags):
        data = json.loads(hf_drt("plan", configured(), *SMALL, "--processes", 4, *flags, "--json").out)
        return data["processes"]

    assert dense("--global-batch", 32)["accumulation"] == 4
    assert dense("--global-batch", 32) == dense("--accumulation", 4)


def test_bfloat16_is_of_the_engine_and_not_of_autocast(hf_drt, configured):
    """Shards stay in float32, and what is sent is half; DDP reduces float32 gradients under autocast too."""

    def dense(engine, *flags):
        wanted = ("plan", configured(), *SMALL, "--processes", 4, "--engine", engine, *flags, "--json")
        return json.loads(hf_drt(*wanted).out)["processes"]["dense"]

    plain, half = dense("fsdp2"), dense("fsdp2", "--bf16")
    assert half["sent_total"] == plain["sent_total"] / 2
    assert (half["weights"], half["optimizer"]) == (plain["weights"], plain["optimizer"])
    assert half["activations"] < plain["activations"]
    assert dense("ddp", "--bf16")["sent_total"] == dense("ddp")["sent_total"]


def test_the_dense_row_has_no_low_rank(hf_drt, configured):
    data = json.loads(hf_drt("plan", configured(), *SMALL, "--processes", 4, "--json").out)["processes"]
    factored, dense = data["phases"]
    assert dense["sent"] == data["dense"]["sent"]
    assert factored["sent"]["all_reduce"] < dense["sent"]["all_reduce"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--engine", "fsdp2"), "--engine: it has no effect without --processes"),
        (("--links", "h100"), "--links: it has no effect without --processes"),
        (("--shards", "2"), "--shards: it has no effect without --processes"),
        (("--global-batch", "8"), "--global-batch: it has no effect without --processes"),
        (("--processes", "1"), "processes must be at least 2, got 1"),
        (("--processes", "4", "--engine", "gspmd"), "'gspmd' is not an engine that is known; allowed are ddp, fsdp2"),
        (("--processes", "16", "--engine", "hsdp", "--shards", "3"), "shards must divide the 16 processes"),
        (("--processes", "16", "--engine", "hsdp"), "engine 'hsdp' needs shards"),
        (("--processes", "16", "--shards", "4"), "shards=4 has no effect with engine 'ddp'"),
        (("--processes", "20"), "20 do not fill nodes of 8: take a multiple of 8"),
        (("--processes", "4", "--links", "h1000"), "'h1000' is neither a machine that is known"),
        (("--processes", "4", "--global-batch", "12"), "12 samples do not divide among 4 processes of 2 samples each"),
        (("--processes", "4", "--global-batch", "0"), "0 samples do not divide among 4 processes"),
        (("--processes", "4", "--global-batch", "16", "--accumulation", "2"), "both say how many forward passes"),
        (("--processes", "4", "--engine", "zero1", "--dtype", "bfloat16"), "zero1 makes the weights' dtype itself"),
        (("--processes", "4", "--max-memory", "1GiB"), "it proposes a plan for one process"),
        (
            ("--processes", "4", "--engine", "fsdp2", "--matrix-optimizer", "muon"),
            "muon needs whole matrices",
        ),
    ],
)
def test_refused(hf_drt, configured, flags, message):
    result = hf_drt("plan", configured(), *SMALL, *flags)
    assert result.code == 2
    assert message in " ".join(result.err.replace("│", " ").split())


def test_auto_says_what_to_take_where_its_optimizer_has_no_whole_matrices(hf_drt, configured):
    words = ("--batch-size", 2, "--seq-length", 8, "--rank-multiple", 1, "--processes", 4, "--engine", "zero3")
    result = hf_drt("plan", configured(), *words)
    assert result.code == 2
    assert "The preset auto brings matrix_optimizer=muon" in " ".join(result.err.split())


def test_speeds_of_the_table_label_the_json(hf_drt, configured, tmp_path):
    (tmp_path / "own.json").write_text(json.dumps(TABLE))
    words = ("plan", configured(), *SMALL, "--processes", 8, "--links", tmp_path / "own.json", "--json")
    machine = json.loads(hf_drt(*words).out)["processes"]["machine"]
    assert machine == {"name": "ours", "origin": "measured", "source": "our own runs", "devices": 4}
