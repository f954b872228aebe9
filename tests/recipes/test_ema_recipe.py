"""What the recipe on averages compares: torch's is right without a switch, and wrong or at an end with one."""

import ema
import pytest

PLANS = {"nothing": "dense@0", "switch": "dense@0 factored:16@4", "restart": "adapter:16@0 adapter:16@4"}


@pytest.mark.parametrize("plan", PLANS)
def test_the_averages_against_that_of_dense_weights(plan):
    own, torchs = (ema.compared(PLANS[plan], make, steps=8) for make in (ema.Own, ema.Torch))
    assert float(own) < 1e-5
    match plan:
        case "nothing":
            assert float(torchs) < 1e-5
        case "switch":
            assert torchs.endswith("at update 4")
        case "restart":
            assert float(torchs) > 1e-2


def test_the_cost_of_an_update(monkeypatch):
    monkeypatch.setattr(ema, "LARGE", {key: value for key, value in ema.SMALL.items() if key != "vocab_size"})
    trained, step, update, share, memory = ema.cost_of("factored:8@0", 1, (2, 8))
    assert trained.endswith(" M")
    assert min(float(step), float(update)) > 0
    assert float(share.removesuffix(" %")) == pytest.approx(100 * float(update) / float(step), rel=0.2)
    assert memory.endswith(" MiB")
