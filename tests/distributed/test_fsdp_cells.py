"""What FSDP2 can be set to, cell by cell: shards on the CPU, precision, HSDP, recomputation, whole weights that are
kept, 2 and 4 processes. Each trains as one process does, and its checkpoints are read by other numbers of processes.
"""

import json
from pathlib import Path

import pytest
from processes import run_worker

WORKER = Path(__file__).with_name("fsdp_trainer_worker.py")
FULL, SHARDED = "FULL_STATE_DICT", "SHARDED_STATE_DICT"
# A checkpoint of step 2 is of the first phase, factored; one of step 10 of the last one, after three switches.
STEPS = [2, 10]

CELLS = {
    "offload": {"kind": SHARDED, "fsdp_config": {"cpu_offload": True}},
    "offload, whole files": {"kind": FULL, "fsdp_config": {"cpu_offload": True}},
    "recomputation": {"kind": SHARDED, "fsdp_config": {"activation_checkpointing": True}},
    "weights kept after the forward pass": {"kind": FULL, "fsdp_config": {"reshard_after_forward": False}},
    "sgd": {"kind": SHARDED, "optim": "sgd", "learning_rate": 0.3},
    "odd ranks, empty shards": {"kind": FULL, "drt_rank": 3, "drt_moments": "project"},
}
HSDP = {
    "hsdp": {"kind": SHARDED, "replicas": 2},
    "hsdp, offload, recomputation": {
        "kind": FULL, "replicas": 2, "fsdp_config": {"cpu_offload": True, "activation_checkpointing": True},
    },
}  # fmt: skip
BF16 = {
    "bf16": {"kind": SHARDED, "bf16": True},
    "weights in bf16, gradients reduced in float32": {"kind": FULL, "bf16": True, "policy": ["bfloat16", "float32"]},
    "weights in float32, gradients reduced in bf16": {"kind": SHARDED, "policy": ["float32", "bfloat16"]},
    "bf16, offload": {"kind": FULL, "bf16": True, "fsdp_config": {"cpu_offload": True}},
}
MATRIX = [(cell, processes) for cell in CELLS for processes in (2, 4)] + [(cell, 4) for cell in HSDP]
_OF_SHARDING = ("kind", "replicas", "policy", "fsdp_config")


def run(folder: Path, processes: int, **settings) -> dict:
    return run_worker(WORKER, folder, processes, timeout=600, **settings) | {"folder": folder}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by settings, each made once."""
    made: dict[str, dict] = {}

    def get(processes: int, **settings) -> dict:
        key = json.dumps([processes, settings], sort_keys=True)
        if key not in made:
            made[key] = run(tmp_path_factory.mktemp("run"), processes, **settings)
        return made[key]

    return get


def alone(runs, settings: dict) -> dict:
    """The same run on one process that shards nothing."""
    return runs(1, **{name: value for name, value in settings.items() if name not in _OF_SHARDING})


def check_sharding(seen: dict, processes: int, replicas: int = 1) -> None:
    assert seen["sharded"]
    assert seen["local"] * (processes // replicas) < 1.2 * seen["total"]


def checkpoints(seen: dict) -> dict[str, str]:
    return {str(step): str(seen["folder"] / f"checkpoint-{step}") for step in STEPS}


@pytest.mark.slow
def test_offloaded_shards_train_as_one_process_does(runs):
    """The quick one of the cells."""
    settings = CELLS["offload"]
    seen = runs(2, **settings, resume=STEPS)
    check_sharding(seen, 2)
    assert seen["losses"] == pytest.approx(alone(runs, settings)["losses"], abs=1e-5)
    assert [row["drt_phase"] for row in seen["history"] if "drt_switch_seconds" in row] == [0, 1, 2, 3]
    assert seen["gaps"] == {"2": 0.0, "10": 0.0}


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "processes"), MATRIX)
def test_a_cell_trains_as_one_process_does_and_resumes_bitwise(runs, cell, processes):
    settings = (CELLS | HSDP)[cell]
    seen = runs(processes, **settings, resume=STEPS)
    check_sharding(seen, processes, settings.get("replicas", 1))
    assert seen["losses"] == pytest.approx(alone(runs, settings)["losses"], abs=1e-5)
    assert seen["gaps"] == {"2": 0.0, "10": 0.0}
    if cell == "odd ranks, empty shards" and processes == 4:
        assert all(count > 0 for count in seen["empty"][3:])  # three rows on four processes


@pytest.mark.slow
@pytest.mark.parametrize(("wrote", "reads"), [(2, 4), (2, 1), (4, 2), (4, 1), (1, 2), (1, 4)])
@pytest.mark.parametrize("cell", ["offload", "sgd", "odd ranks, empty shards"])
def test_a_checkpoint_is_read_by_another_number_of_processes(runs, cell, wrote, reads):
    """Before a switch and after one, with the global batch kept. One process is a mesh of one here."""
    settings = CELLS[cell]
    before = runs(wrote, **settings, resume=STEPS)
    seen = runs(reads, **settings, others=checkpoints(before))
    for step in map(str, STEPS):
        assert seen["others"][step]["losses"] == pytest.approx(alone(runs, settings)["losses"], abs=1e-5)
        assert seen["others"][step]["gap"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("wrote", "reads"), [("hsdp", "plain"), ("plain", "hsdp")])
def test_hsdp_reads_checkpoints_of_two_processes_and_they_its_own(runs, wrote, reads):
    cells = {"plain": (2, {"kind": SHARDED}), "hsdp": (4, HSDP["hsdp"])}
    processes, settings = cells[wrote]
    before = runs(processes, **settings, resume=STEPS)
    processes, settings = cells[reads]
    seen = runs(processes, **settings, others=checkpoints(before))
    for step in map(str, STEPS):
        assert seen["others"][step]["losses"] == pytest.approx(alone(runs, settings)["losses"], abs=1e-5)
        assert seen["others"][step]["gap"] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("cell", BF16)
def test_a_cell_in_bf16_follows_one_process_and_resumes_bitwise(runs, cell, processes):
    """Of a bf16 number the last of 8 bits is 1/256 of it: a loss of 4.2 is the mean of 56 rounded ones, on one process
    and here rounded at other places."""
    settings = BF16[cell]
    seen = runs(processes, **settings, resume=STEPS)
    check_sharding(seen, processes)
    expected = alone(runs, settings)["losses"]
    assert expected[0] - expected[-1] > 0.15
    assert seen["losses"] == pytest.approx(expected, abs=0.01)
    assert seen["gaps"] == {"2": 0.0, "10": 0.0}


# ---- what a layer is


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [{"kind": SHARDED}, {"kind": FULL, "fsdp_config": {"cpu_offload": True}, "drt_moments": "project"}],
    ids=["sharded files", "whole files, offload"],
)
def test_fused_experts_change_form_under_fsdp(runs, settings, processes):
    settings = {"model": "mixtral", **settings}
    seen = runs(processes, **settings, resume=STEPS)
    check_sharding(seen, processes)
    assert seen["losses"] == pytest.approx(alone(runs, settings)["losses"], abs=1e-5)
    assert seen["gaps"] == {"2": 0.0, "10": 0.0}


# ---- batches in pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "mean", "passes"), [(2, False, 30), (4, False, 30), (2, True, 30), (4, True, 29)]
)
def test_divided_batches_of_processes_with_other_numbers_of_labels(runs, processes, mean, passes):
    """Where a process has a piece without labels and another none, all make as many passes: in 3 dense updates of two
    batches twice as many. Of a mean over labels, pieces without any are left out: on four processes the second of these
    batches has no more than one sample with labels on each."""
    settings = {"kind": SHARDED, "padded": True, "mean": mean, "optim": "sgd", "learning_rate": 0.3}
    settings["drt_schedule"] = "factored@0 dense@3 adapter@6 factored@9"
    seen = runs(processes, **settings, drt_dense_accumulation=2, resume=STEPS)
    whole = runs(processes, **settings)
    assert (whole["passes"], seen["passes"]) == (24, passes)
    assert seen["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    assert seen["gaps"] == {"2": 0.0, "10": 0.0}
