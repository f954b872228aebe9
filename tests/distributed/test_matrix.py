"""A whole cycle in every precision, with and without accumulation and torch.compile, on one process and on two.

All cells see the same rows in each update, so they end at the loss of the plainest one.
"""

import math

import pytest
import tiny
import torch
from processes import final, launch_all

PRECISIONS = {
    "float32": {},
    "bf16 autocast": {"bf16": True},
    "bf16 weights": {"dtype": "bfloat16"},
    "fp16 argument on a CPU": {"fp16": True},
    "fp16 autocast": {"fp16": True, "gpu_fp16": True},
}
COMPILED = [name for name in PRECISIONS if name != "fp16 argument on a CPU"]
CYCLE = {
    "max_steps": 12, "drt_schedule": "factored@0 dense@3 adapter@6 factored@9", "dropout": 0.0, "learning_rate": 1e-2,
    "logging_steps": 1, "evaluate": True,
}  # fmt: skip
ROWS = 8


def run(folder, processes: int, precisions, watch, timeout: int = 300, **settings) -> dict[tuple, dict]:
    """The cells of one number of processes, in one launch."""
    cells = {}
    for precision in precisions:
        for accumulation in (1, 2):
            rows = ROWS // accumulation // processes
            shape = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": rows}
            cells[f"{precision} {accumulation}"] = CYCLE | PRECISIONS[precision] | shape | {"watch": watch} | settings
    return launch_all(folder, processes, cells, timeout=timeout)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {processes: tmp_path_factory.mktemp(f"on{processes}") for processes in (1, 2)}


@pytest.fixture(scope="module")
def eager(folders):
    return {n: run(folders[n], n, PRECISIONS, ("Bits", "Reductions")) for n in (1, 2)}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    watch, folder = ("Bits", "Compilations"), tmp_path_factory.mktemp("compiled")
    return {n: run(folder / str(n), n, COMPILED, watch, 3000, torch_compile=True) for n in (1, 2)}


def check(cell: dict, processes: int, expected: float) -> None:
    losses = [row["loss"] for row in cell["history"] if "loss" in row]
    assert len(losses) >= 8
    assert all(map(math.isfinite, losses))
    switches = [row for row in cell["history"] if "drt_switch_seconds" in row]
    assert [(row["step"], row["drt_phase"]) for row in switches] == [(0, 0), (3, 1), (6, 2), (9, 3)]
    assert cell.get("equal", []) == [True] * (12 if processes > 1 else 0)
    assert losses[0] - cell["loss"] > 0.25
    # two per cent of what training gained
    assert cell["loss"] == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_cycle(eager, precision, accumulation, processes):
    cell = eager[processes][f"{precision} {accumulation}"]
    check(cell, processes, eager[1]["float32 1"]["loss"])
    assert cell["reductions"] == [processes - 1] * 12


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", COMPILED)
def test_a_whole_cycle_of_a_compiled_model(eager, compiled, precision, accumulation, processes):
    cell = compiled[processes][f"{precision} {accumulation}"]
    check(cell, processes, eager[1]["float32 1"]["loss"])
    # one graph to a phase, captured and compiled once; DDP's own code around it is no graph
    assert cell["graphs"] == {str(phase): [phase + 1, phase + 1] for phase in range(4)}


# ---- what a CPU does with fp16


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_argument_fp16_is_float32_on_a_cpu(eager, folders, accumulation, processes):
    """Accelerate neither refuses it nor does it: no autocast, no scaler."""
    weights = final(folders[processes] / f"fp16 argument on a CPU {accumulation}")
    expected = final(folders[processes] / f"float32 {accumulation}")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], p) for name, p in expected.items())
    autocast = final(folders[processes] / f"fp16 autocast {accumulation}")
    assert not all(torch.equal(autocast[name], p) for name, p in expected.items())


def test_gradient_scaling_of_fp16_weights_is_refused_by_torch(tmp_path):
    trainer = tiny.trainer(tmp_path, tiny.llama().half(), use_cpu=True, fp16=True)
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match=r"^Attempting to unscale FP16 gradients\.$"):
        trainer.train()


def test_fp16_weights_without_scaling_diverge_under_adam_and_the_next_switch_says_so(tmp_path):
    """Adam's epsilon of 1e-8 is 0 in fp16."""
    trainer = tiny.trainer(tmp_path, tiny.llama().half(), use_cpu=True)
    with pytest.raises(ValueError, match=r"holds inf or nan\. The training has diverged"):
        trainer.train()
