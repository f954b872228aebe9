"""The settings on memory of activations on two gloo processes: against a run without them."""

import pytest
import torch
from processes import final, launch_all, torchrun

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.01, "gradient_accumulation_steps": 2}
ROTATION = "factored@0 dense[1/2]@20% dense[2/2]+frozen[1/2]@50% frozen@80%"
CELLS = {
    "without": {},
    "checkpointed": {"drt_dense_checkpointing": True, "drt_recompute": "bottleneck"},
    "divided": {"drt_dense_accumulation": 3},
}
COMMON = {**SGD, "dropout": 0.0, "drt_schedule": ROTATION}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    return folder, launch_all(folder, 2, {name: COMMON | cell for name, cell in CELLS.items()}, launcher=torchrun)


@pytest.mark.parametrize("name", CELLS)
def test_processes_hold_the_same_bits_by_one_reduction_per_update(runs, name):
    """Pieces but the last are passed without a reduction."""
    seen = runs[1][name]
    assert seen["equal"] == [True] * 20
    assert seen["reductions"] == [1] * 20


def test_checkpointed_blocks_give_the_same_bits(runs):
    ours, theirs = final(runs[0] / "checkpointed"), final(runs[0] / "without")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_batches_in_pieces_give_the_same_weights(runs):
    ours, theirs = final(runs[0] / "divided", "dense.pt"), final(runs[0] / "without", "dense.pt")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)
    assert not all(torch.equal(ours[name], theirs[name]) for name in theirs)
