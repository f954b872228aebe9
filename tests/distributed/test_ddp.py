"""Several processes: nothing drifts. Two gloo processes against one, with three switches and accumulation."""

import pytest
import torch
from processes import accelerate, final, launch, launch_all, torchrun

from hf_drt.engines.decompose import shares

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 7}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return folder, launch(folder, 2, launcher=torchrun, gradient_accumulation_steps=2, **SGD)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same global batch in one process: twice the accumulation."""
    folder = tmp_path_factory.mktemp("one")
    return folder, launch(folder, 1, gradient_accumulation_steps=4, **SGD)


def test_all_processes_hold_the_same_bits_after_every_step(two):
    _, seen = two
    assert len(seen["equal"]) == 20
    assert all(seen["equal"])
    assert [row["drt_phase"] for row in seen["history"] if "drt_switch_seconds" in row] == [0, 1, 2, 3]


def test_one_reduction_per_bucket_and_update_step(two):
    """The model fits into one bucket; with accumulation 2, a lost no_sync would show as 2, a dead reducer as 0.

    DDP rebuilds its buckets once, in the first backward pass of each reducer.
    """
    _, seen = two
    assert seen["reductions"] == [1] * 20


@pytest.mark.parametrize(
    "launcher", [pytest.param(accelerate, marks=pytest.mark.slow), None], ids=["accelerate", "forked"]
)
def test_other_launchers_give_the_same_bits_as_torchrun(two, tmp_path, launcher):
    seen = launch(tmp_path, 2, launcher=launcher, gradient_accumulation_steps=2, **SGD)
    assert all(seen["equal"])
    assert len(seen["equal"]) == 20
    for name in ("final.pt", "optimizer.pt"):
        assert_equal(final(tmp_path, name), final(two[0], name))


def assert_equal(tree, expected) -> None:
    torch.testing.assert_close(tree, expected, rtol=0, atol=0, equal_nan=True)


def test_one_ddp_object_throughout(two):
    assert two[1]["ddp_objects"] == 1


@pytest.mark.parametrize("sides", [{}, {"drt_left_lr_scale": 2.0, "drt_right_lr_scale": 0.5}], ids=["plain", "sides"])
def test_two_processes_equal_one_with_the_same_global_batch(tmp_path, sides):
    """Without dropout, whose noise differs between processes; weights, since factors of one weight are not unique."""
    runs = {}
    for processes, accumulation in ((2, 2), (1, 4)):
        folder = tmp_path / str(processes)
        settings = SGD | {"learning_rate": 0.01, "dropout": 0.0, "gradient_accumulation_steps": accumulation}
        launch(folder, processes, **settings, **sides)
        runs[processes] = final(folder, "dense.pt")
    for name, p in runs[1].items():
        assert torch.allclose(p, runs[2][name], atol=1e-5, rtol=0), name


TURNS = {
    "frozen": {"drt_schedule": "rotate(groups=4,share=80)"},
    "need": {"drt_schedule": "rotate(groups=3,share=75,order=need,rounds=2)", "drt_frozen_dtype": "bfloat16"},
    "adapter": {"drt_schedule": "rotate(groups=2,share=80,after=adapter)", "drt_moments": "project"},
}


def test_turns_of_full_rank_are_the_same_on_all_processes_and_what_one_process_does(tmp_path):
    settings = SGD | {"learning_rate": 0.01, "dropout": 0.0, "max_steps": 10, "drt_rank": 4}
    for processes, accumulation in ((2, 2), (1, 4)):
        own = settings | {"gradient_accumulation_steps": accumulation}
        cells = {name: own | changes for name, changes in TURNS.items()}
        for seen in launch_all(tmp_path / str(processes), processes, cells).values():
            assert seen.get("equal", []) == [True] * (10 if processes > 1 else 0)
    for name in TURNS:
        found, expected = (final(tmp_path / f"{processes}/{name}", "dense.pt") for processes in (2, 1))
        for key, p in expected.items():
            close = 1e-5 + (2**-8 * p.abs() if name == "need" else 0)  # a last bit decides how bfloat16 rounds
            assert ((found[key] - p).abs() <= close).all(), (name, key)


@pytest.mark.slow
def test_adapters_that_are_split_are_the_same_on_all_processes_and_what_one_process_does(tmp_path):
    settings = SGD | {"learning_rate": 0.01, "dropout": 0.0, "max_steps": 10}
    ends = {"down": "first=0.6,last=0.125", "up": "first=0.125,last=0.6"}
    for processes, accumulation in ((2, 2), (1, 4)):
        own = settings | {"gradient_accumulation_steps": accumulation}
        cells = {name: own | {"drt_schedule": f"drift({text},levels=3)"} for name, text in ends.items()}
        for seen in launch_all(tmp_path / str(processes), processes, cells).values():
            assert seen.get("equal", []) == [True] * (10 if processes > 1 else 0)
            assert [row["drt_phase"] for row in seen["history"] if "drt_switch_seconds" in row] == [0, 1, 2]
    for name in ends:
        found, expected = (final(tmp_path / f"{processes}/{name}", "dense.pt") for processes in (2, 1))
        for key, p in expected.items():
            assert torch.allclose(found[key], p, atol=1e-5, rtol=0), (name, key)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bases_in_fewer_bits_are_the_same_on_all_processes(tmp_path, dtype):
    """And those of one process, but where a last bit decides how a weight is rounded."""
    settings = SGD | {"learning_rate": 0.01, "dropout": 0.0, "max_steps": 10, "drt_rank": 4, "drt_frozen_dtype": dtype}
    settings |= {"drt_schedule": "dense@0 adapter@3 adapter@6 dense@8"}
    for processes, accumulation in ((2, 2), (1, 4)):
        seen = launch(tmp_path / str(processes), processes, **settings, gradient_accumulation_steps=accumulation)
        assert seen.get("equal", []) == [True] * (10 if processes > 1 else 0)
    found, expected = (final(tmp_path / str(processes), "dense.pt") for processes in (2, 1))
    for name, p in expected.items():
        assert (found[name] - p).norm() <= 1e-3 * p.norm(), name


# Newton-Schulz of dense weights is in bfloat16, where the last bit of a gradient can turn one of eight.
MATRICES = {
    "auto": ({"drt_schedule": "auto", "drt_matrix_optimizer": None}, 1e-5),
    "pairs": ({"drt_schedule": "factored@0 adapter@3 factored@6"}, 1e-5),
    "dense": ({"drt_schedule": "dense@0 factored@6 dense@8"}, 0.005 * 10 * 2**-6),  # CPUs differ in bf16 products
}


def test_the_matrix_optimizer_does_the_same_on_all_processes_and_what_one_does(tmp_path):
    """Each process whitens and orthogonalises for itself."""
    settings = SGD | {
        "drt_matrix_optimizer": "muon", "drt_matrix_lr": 0.005, "dropout": 0.0, "weight_decay": 0.1, "max_steps": 10,
        "learning_rate": 0.01,
    }  # fmt: skip
    for processes, accumulation in ((2, 2), (1, 4)):
        own = settings | {"gradient_accumulation_steps": accumulation}
        cells = {name: own | changes for name, (changes, _) in MATRICES.items()}
        for seen in launch_all(tmp_path / str(processes), processes, cells).values():
            assert seen.get("equal", []) == [True] * (10 if processes > 1 else 0)
    for name, (_, tolerance) in MATRICES.items():
        found, expected = (final(tmp_path / f"{processes}/{name}", "dense.pt") for processes in (2, 1))
        for key, p in expected.items():
            assert (found[key] - p).abs().max() < tolerance, key


@pytest.mark.slow
def test_phases_of_another_dtype_are_the_same_on_all_processes_and_what_one_process_does(tmp_path):
    """DDP stays as it is where the dtype alone changes."""
    settings = SGD | {"learning_rate": 0.01, "dropout": 0.0, "max_steps": 8, "drt_rank": 4}
    schedule = {"drt_schedule": "factored/fp32@0 factored/bf16@2 dense/bf16@4 dense/fp32@6"}
    for processes, accumulation in ((2, 2), (1, 4)):
        own = settings | {"gradient_accumulation_steps": accumulation}
        seen = launch(tmp_path / str(processes), processes, **own, **schedule)
        assert seen.get("equal", []) == [True] * (8 if processes > 1 else 0)
        assert seen["reductions"] == [processes - 1] * 8
    for key, p in final(tmp_path / "1", "dense.pt").items():
        assert (final(tmp_path / "2", "dense.pt")[key] - p).abs().max() < 1e-4, key


def test_resume_of_two_processes_is_bitwise_equal(two, tmp_path):
    folder, _ = two
    for step in (7, 14):
        seen = launch(
            tmp_path / str(step), 2, gradient_accumulation_steps=2, resume=str(folder / f"checkpoint-{step}"), **SGD
        )
        assert all(seen["equal"])
        resumed = final(tmp_path / str(step))
        assert all(torch.equal(p, resumed[name]) for name, p in final(folder).items())


def test_resume_with_another_number_of_processes(two, one, tmp_path):
    for source, processes, accumulation in ((two, 1, 4), (one, 2, 2)):
        folder = tmp_path / f"to{processes}"
        checkpoint = str(source[0] / "checkpoint-7")
        seen = launch(folder, processes, gradient_accumulation_steps=accumulation, resume=checkpoint, **SGD)
        assert seen.get("equal", []) == [True] * (13 if processes > 1 else 0)
        assert final(folder).keys() == final(source[0]).keys()


@pytest.mark.parametrize("decomposition", ["svd", "tucker", "cp"])
def test_convolutions_change_form_on_all_processes_alike(tmp_path, decomposition):
    seen = launch(tmp_path, 2, kind="resnet", drt_decomposition=decomposition, drt_rank_ratio=0.25, **SGD)
    assert seen["equal"] == [True] * 20
    assert [row["drt_phase"] for row in seen["history"] if "drt_switch_seconds" in row] == [0, 1, 2, 3]


def test_decompositions_are_shared_out_by_cost():
    owners = shares([8.0, 1.0, 1.0, 7.0, 1.0, 6.0], 2)
    loads = [sum(c for c, o in zip([8, 1, 1, 7, 1, 6], owners, strict=True) if o == process) for process in (0, 1)]
    assert max(loads) - min(loads) <= 1 + 1
    assert shares([1.0], 4) == [0]
    assert shares([], 2) == []
