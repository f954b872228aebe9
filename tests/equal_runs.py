"""Whether two runs have ended alike."""

import torch


def assert_equal_runs(trainer, other) -> None:
    """Weights, parameter groups and the optimizer's state, bit for bit."""
    weights, expected = trainer.model.state_dict(), other.model.state_dict()
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []
    state, expected = trainer.optimizer.state_dict(), other.optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    for index, entries in expected["state"].items():
        assert entries.keys() == state["state"][index].keys()
        for key, value in entries.items():
            assert torch.equal(torch.as_tensor(state["state"][index][key]), torch.as_tensor(value)), (index, key)
