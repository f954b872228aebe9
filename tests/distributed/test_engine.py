"""What a user has set on DistributedDataParallel is still in force after every switch, and nothing old is left."""

import pytest
from processes import launch_all

SWITCHES = {"max_steps": 16, "drt_schedule": "factored@0 dense@4 adapter@8 factored@12", "max_grad_norm": 0.0}
EVERY_PARAMETER_IS_USED = {"ddp_find_unused_parameters": False}
POWER_SGD = {"comm_hook": "power_sgd", "comm_state_option": {"start_powerSGD_iter": 2}}
MEMORYLESS = {"start_powerSGD_iter": 0, "use_error_feedback": False, "warm_start": False}
OPTIONS = {
    "find unused": {"ddp_find_unused_parameters": True},
    "find unused, not rebuilt": {"ddp_find_unused_parameters": True, "rebuild": False},
    "used": EVERY_PARAMETER_IS_USED,
    "buckets and buffers": {"ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": False},
    "static graph": {"ddp_static_graph": True, "gradient_accumulation_steps": 1},
    "views": {"handler": {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.02}} | EVERY_PARAMETER_IS_USED,
}
# PowerSGD's collectives and the one that looks for unused parameters run at once, and gloo mixes them up; nothing here
# has a part in that. DDP lays out its buckets anew after the first update, so theirs change within a phase.
HOOKS = {
    "fp16": {"watch": ("Bits", "Hooks")},
    "PowerSGD": {"watch": ("Bits", "PowerSGD")} | EVERY_PARAMETER_IS_USED,
    "accelerate's fp16": {"watch": ("Bits", "Hooks"), "handler": {"comm_hook": "fp16"}},
    "accelerate's PowerSGD": {"watch": ("Bits", "Hooks"), "handler": POWER_SGD} | EVERY_PARAMETER_IS_USED,
    "PowerSGD from the start": {"watch": ("Bits", "Hooks"), "handler": POWER_SGD | {"comm_state_option": MEMORYLESS}}
    | EVERY_PARAMETER_IS_USED,
}
LIFETIMES = {"old parts": {"watch": ("Bits", "Lifetimes")}}
LONGER = {"max_steps": 20, "drt_schedule": "factored@0 dense@6 adapter@12 factored@16", "auto_find_batch_size": True}
OUT_OF_MEMORY = {f"out of memory at {step}": LONGER | {"out_of_memory_at": step} for step in (2, 8, 14)}
FAILING = {"a decomposition fails": {"failing_rank": 1, "drt_schedule": "dense@0 factored@4"}}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """All runs in one launch, for it costs more than they do."""
    options = {name: {"watch": ("Bits", "Options")} | cell for name, cell in OPTIONS.items()}
    cells = {name: SWITCHES | cell for name, cell in (options | HOOKS | LIFETIMES | OUT_OF_MEMORY | FAILING).items()}
    return launch_all(tmp_path_factory.mktemp("engine"), 2, cells)


@pytest.mark.parametrize("cell", [name for name in {**OPTIONS, **HOOKS, **LIFETIMES} if "not rebuilt" not in name])
def test_all_processes_hold_the_same_bits_in_one_ddp_object(seen, cell):
    assert seen[cell]["equal"] == [True] * 16
    assert seen[cell]["ddp_objects"] == 1
    assert [row["drt_phase"] for row in seen[cell]["history"] if "drt_switch_seconds" in row] == [0, 1, 2, 3]


def test_without_a_new_reducer_they_would_drift_apart_in_silence(seen):
    """With find_unused_parameters, parameters that the reducer does not know raise no error."""
    assert seen["find unused, not rebuilt"]["equal"] == [True] * 4 + [False] * 12


# ---- options

MIB = 2**20
REDUCER = {
    "find unused": {"find_unused_parameters": 1, "bucket_cap_bytes": 25 * MIB, "broadcast_buffers": 1},
    "used": {"find_unused_parameters": 0, "static_graph": 0, "gradient_as_bucket_view": 0},
    "buckets and buffers": {"bucket_cap_bytes": 7 * MIB, "broadcast_buffers": 0},
    "static graph": {"static_graph": 1},
    "views": {"gradient_as_bucket_view": 1, "bucket_cap_bytes": int(0.02 * MIB)},
}


@pytest.mark.parametrize("cell", REDUCER)
def test_the_reducer_of_every_phase_has_the_options_given(seen, cell):
    phases = seen[cell]["options"]
    assert list(phases) == ["0", "1", "2", "3"]
    for options in phases.values():
        assert {name: options[name] for name in REDUCER[cell]} == REDUCER[cell]


def test_the_reducer_of_every_phase_has_the_parameters_of_its_form(seen):
    """Two blocks of 7 layers, and 7 other parameters; factors are two to a layer."""
    counts = [options["num_parameter_tensors"] for options in seen["used"]["options"].values()]
    assert counts == [35, 21, 35, 35]


# ---- communication hooks


@pytest.mark.parametrize("cell", HOOKS)
def test_the_hook_and_its_state_are_the_same_objects_after_every_switch(seen, cell):
    assert [row["kept"] for row in seen[cell]["hooks"]] == [True] * 16


@pytest.mark.parametrize("cell", ["fp16", "accelerate's fp16"])
def test_gradients_are_compressed_in_every_step(seen, cell):
    assert [row["fp16"] for row in seen[cell]["hooks"]] == [True] * 16
    assert not any(row["fp16"] for row in seen["PowerSGD"]["hooks"])


@pytest.mark.parametrize("cell", [name for name in HOOKS if "PowerSGD" in name])
def test_power_sgd_compresses_again_from_the_third_update_after_a_switch_on(seen, cell):
    """To rank one: of each layer's gradient its best direction, and none of the error of an earlier phase's layers."""
    compressed = [row["rank"] == 1 for row in seen[cell]["hooks"]]
    first = [True] * 4 if cell == "PowerSGD from the start" else [False, False, True, True]
    assert compressed == first + [False, False, True, True] * 3


# ---- what is left of the phase before


def test_nothing_of_the_phase_before_is_alive_after_a_switch(seen):
    """Neither its reducer nor, but for what the new form took over, storage of its layers' weights, of their moments,
    or of buckets."""
    rows = seen["old parts"]["alive"]
    assert len(rows) == 3
    for row, weights in zip(rows, (28, 14, 42), strict=True):
        assert row == {"reducer": False, "weights": [0, weights], "moments": [0, row["moments"][1]], "buckets": [0, 1]}
        assert row["moments"][1] >= 2 * 14


# ---- auto_find_batch_size


@pytest.mark.parametrize("step", [2, 8, 14])
def test_out_of_memory_begins_anew_in_the_first_phase_with_smaller_batches(seen, step):
    """Accelerate takes nine tenths of 4 rows. The reductions tell that no reducer of the first attempt is left."""
    cell = seen[f"out of memory at {step}"]
    assert cell["batch_size"] == 3
    assert cell["equal"] == [True] * (step + 20)
    assert cell["reductions"] == [1] * (step + 20)
    assert cell["ddp_objects"] == 2
    rows = [row for row in cell["history"] if "drt_switch_seconds" in row]
    assert [(row["step"], row["drt_phase"]) for row in rows] == [(0, 0), (6, 1), (12, 2), (16, 3)]
    assert {row["drt_trainable_parameters"] for row in rows[::2]} == {rows[0]["drt_trainable_parameters"]}


# ---- a switch that fails


def test_out_of_memory_in_a_switch_on_one_process_stops_all_of_them(seen):
    """None is left waiting for the result."""
    cell = seen["a decomposition fails"]
    own, other = cell["errors"][1], cell["errors"][0]
    assert own == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB."
    assert other == "ValueError: the change of form failed on another process; its log has the reason."
    assert cell["equal"] == [True] * 4
