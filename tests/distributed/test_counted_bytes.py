"""What hf-drt plan predicts of several processes against the bytes that real ones hold and send, over gloo."""

import json
from pathlib import Path

import forked
import pytest
import tiny
import torch

from hf_drt import DRTConfig, DynamicRank
from hf_drt.simulate import batch_spec, estimate_run, layout_for, machine_for, on_processes
from hf_drt.simulate.processes.layouts import LAYOUTS
from hf_drt.simulate.processes.ring import sent

WORKER = Path(__file__).with_name("bytes_worker.py")
D, RANK = 128, 16
# Target layers have 90 % of its weights; 2 x 352 x 128 and 4 x 128 x 128 in each of two blocks.
LLAMA = {"vocab_size": 174, "hidden_size": D, "intermediate_size": 352, "num_hidden_layers": 2}
DRT = {"schedule": "factored@0 dense@2 adapter@4", "rank": RANK}
STEPS, ACCUMULATION = 6, 2


def counted(folder: Path, processes: int, engine: str, drt: dict = DRT, **more) -> list[list[dict]]:
    """Of every process and update step."""
    settings = {"engine": engine, "model": LLAMA, "drt": drt, "max_steps": STEPS,
                "gradient_accumulation_steps": ACCUMULATION, **more}  # fmt: skip
    result = forked.distributed(WORKER, folder, json.dumps(settings), processes=processes, timeout=300)
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads((folder / "seen.json").read_text())


def predicted(processes: int, engine: str, drt: dict = DRT, shards: int | None = None, accumulation: int = 2):
    with torch.device("meta"):
        model = tiny.llama(**LLAMA)
    controller = DynamicRank(model, DRTConfig(**drt), STEPS)
    run = estimate_run(controller, batch_spec(model, 1, tiny.LENGTH), accumulation=accumulation)
    return on_processes(
        controller, [phase.step for phase in run.phases], run.dense, layout_for(engine, processes, shards=shards),
        machine_for("h100"), optimizer="adamw_torch", accumulation=accumulation, dtype="float32",
    )  # fmt: skip


def by_ring(row: dict, processes: int, shards: int | None = None) -> dict[str, float]:
    """Bytes sent of the tensors counted, if they go round a ring."""
    inside, across = (processes, processes) if shards is None else (shards, processes // shards)
    return {kind: sent(kind, size, across if kind == "all_reduce" else inside) for kind, size in row["sizes"].items()}


def check(seen: list[list[dict]], run, processes: int, shards: int | None = None) -> None:
    """Within 5 %, in the second update step of each phase and on every process: in the first DDP has its buckets in
    another order."""
    for rows in seen:
        for index, phase in enumerate(run.phases):
            found = by_ring(rows[2 * index + 1], processes, shards)
            for kind, size in phase.sent.items():
                if kind != "broadcast":
                    assert found.get(kind, 0) == pytest.approx(size, rel=0.05, abs=64), (index, kind)


CELLS = [
    pytest.param(2, id="2"),
    pytest.param(4, id="4", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("processes", CELLS)
def test_ddp_sends_what_was_predicted(tmp_path, processes):
    seen, run = counted(tmp_path, processes, "ddp"), predicted(processes, "ddp")
    check(seen, run, processes)
    for index, phase in enumerate(run.phases):
        row = seen[0][2 * index + 1]
        # What went to sockets: gloo's all-reduce is a ring. The buffers' broadcast and headers are in it too.
        assert row["written"] == pytest.approx(phase.total, rel=0.05)
        assert row["weights"] == sum(p.numel() * 4 for p in _model_in(index).parameters())
        assert row["gradients"] == phase.held.gradients
        assert row["optimizer"] == pytest.approx(phase.optimizer, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_ddp_at_an_eighth_of_the_width_sends_less_than_three_tenths_of_dense(tmp_path, processes):
    factored, dense = (
        counted(tmp_path / name, processes, "ddp", drt={"schedule": schedule, **rank}, max_steps=2)
        for name, schedule, rank in (("low", "factored@0", {"rank": RANK}), ("dense", "dense@0", {}))
    )
    share = factored[0][1]["sizes"]["all_reduce"] / dense[0][1]["sizes"]["all_reduce"]
    assert share <= 0.30
    run = predicted(processes, "ddp")
    assert share == pytest.approx(run.phases[0].sent["all_reduce"] / run.dense.sent["all_reduce"], rel=0.01)


@pytest.mark.parametrize("processes", CELLS)
def test_fsdp2_sends_what_was_predicted(tmp_path, processes):
    """Rank 18 is no multiple of four: shards of V are padded."""
    drt = DRT | {"rank": 18}
    seen, run = counted(tmp_path, processes, "fsdp2", drt), predicted(processes, "fsdp2", drt)
    check(seen, run, processes)
    hold(seen[0], predicted(processes, "fsdp2", drt, accumulation=1))


@pytest.mark.slow
def test_hsdp_sends_what_was_predicted(tmp_path):
    drt = DRT | {"rank": 17}
    seen, run = counted(tmp_path, 4, "hsdp", drt, shards=2), predicted(4, "hsdp", drt, shards=2)
    check(seen, run, 4, shards=2)
    hold(seen[0], predicted(4, "hsdp", drt, shards=2, accumulation=1))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("processes", [2, 4])
def test_zero_sends_what_was_predicted(tmp_path, monkeypatch, stage, processes):
    """Of ZeRO-3 all weights are in parts; by its own threshold they would be small ones."""
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    monkeypatch.setattr(LAYOUTS["zero3"], "persistent", 0)
    engine = f"zero{stage}"
    check(counted(tmp_path, processes, engine), predicted(processes, engine), processes)


def hold(rows: list[dict], run) -> None:
    """What the first process holds, whose shards are the largest, once gradients are reduced."""
    for index, phase in enumerate(run.phases):
        row = rows[2 * index + 1]
        assert row["weights"] == pytest.approx(phase.held.weights, rel=0.01)
        assert row["gradients"] == phase.held.gradients
        assert row["optimizer"] == pytest.approx(phase.optimizer, rel=0.01)


def _model_in(phase: int):
    with torch.device("meta"):
        model = tiny.llama(**LLAMA)
    controller = DynamicRank(model, DRTConfig(**DRT), STEPS)
    for index in range(phase + 1):
        controller.empty_phase(index)
    return model
