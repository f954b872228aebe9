"""Truncation weighed by inputs on several processes, each of which sees others of them: against one process.

``pytest -m slow tests/distributed/test_weighed_runs.py``.
"""

from pathlib import Path

import pytest
import torch
from processes import final, launch, run_worker, torchrun

SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.01, "dropout": 0.0}
WEIGHED = {"drt_schedule": "dense@0 factored@4 dense@6 factored@8", "drt_truncation": "activation", "max_steps": 10}


@pytest.mark.slow
def test_ddp_holds_the_same_bits_and_truncates_as_one_process_does(tmp_path):
    two = launch(tmp_path / "2", 2, launcher=torchrun, gradient_accumulation_steps=2, **SGD, **WEIGHED)
    one = launch(tmp_path / "1", 1, gradient_accumulation_steps=4, **SGD, **WEIGHED)
    assert two["equal"] == [True] * 10
    errors, expected = ([row.get("drt_truncation_error", 0.0) for row in seen["history"]] for seen in (two, one))
    assert sum(error > 0 for error in expected) == 2
    assert errors == pytest.approx(expected, rel=1e-4)
    ours, theirs = final(tmp_path / "2", "dense.pt"), final(tmp_path / "1", "dense.pt")
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_sharded_run_has_the_losses_of_one_process_and_resumes_in_the_window_bitwise(tmp_path):
    settings = {"drt_schedule": "dense@0 factored@4 dense@8", "drt_truncation": "activation"}
    worker = Path(__file__).with_name("fsdp_trainer_worker.py")
    expected = run_worker(worker, tmp_path / "one", 1, **settings)
    seen = run_worker(worker, tmp_path / "two", 2, resume=[2, 4], kind="FULL_STATE_DICT", **settings)
    assert seen["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert seen["gaps"] == {"2": 0.0, "4": 0.0}
