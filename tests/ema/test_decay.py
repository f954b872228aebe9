"""The decay of every update, against the formulas written out."""

import pytest

from hf_drt import EMADecay


def found(updates: int, **settings) -> list[float | None]:
    decay = EMADecay(**settings)
    return [decay.at(n) for n in range(1, updates + 1)]


def test_the_warm_up_is_diffusers_own_by_default():
    assert found(6) == [0.0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15]
    assert EMADecay(0.9).at(10**6) == 0.9


def test_the_warm_up_by_inv_gamma_and_power():
    expected = [0.0, *(1 - (1 + t / 4) ** -0.75 for t in range(1, 6))]
    assert found(6, inv_gamma=4.0, power=0.75) == pytest.approx(expected)
    assert found(3, power=1.0) == pytest.approx([0.0, 1 - 1 / 2, 1 - 1 / 3])  # a plain mean
    assert found(3, inv_gamma=1) == pytest.approx([0.0, 1 - 2 ** (-2 / 3), 1 - 3 ** (-2 / 3)])


def test_without_warm_up_it_is_constant_after_the_copy():
    assert found(4, decay=0.9, warmup=False) == [0.0, 0.9, 0.9, 0.9]


def test_the_least_decay_holds_from_the_first_average_on():
    assert found(4, min_decay=0.27) == [0.0, 0.27, 0.27, 4 / 13]


def test_averaging_begins_after_some_updates():
    assert found(6, update_after_step=3) == [0.0, 0.0, 0.0, 0.0, 2 / 11, 3 / 12]


def test_the_average_moves_at_every_kth_update_and_warms_up_by_its_moves():
    assert found(9, update_every=3) == [None, None, 0.0, None, None, 2 / 11, None, None, 3 / 12]
    moves = found(12, update_every=3, update_after_step=4)[2::3]
    assert moves == [0.0, 0.0, 0.0, 2 / 11]  # updates 3, 6, 9, 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": 1.0}, r"decay must lie in \(0, 1\), the share that stays, got 1.0"),
        ({"decay": 0}, r"decay must lie in \(0, 1\)"),
        ({"decay": "0.9"}, r"decay must lie in \(0, 1\), .*, got '0.9'"),
        ({"decay": float("nan")}, r"decay must lie in \(0, 1\)"),
        ({"warmup": 1}, "warmup must be True or False, got 1"),
        ({"inv_gamma": 0}, "inv_gamma must be a number above 0, got 0"),
        ({"power": -1.0}, "power must be a number above 0, got -1.0"),
        ({"min_decay": 0.9995}, r"min_decay must lie in \[0, decay = 0.999\], got 0.9995"),
        ({"update_after_step": -1}, "update_after_step must be a whole number of update steps, 0 or more, got -1"),
        ({"update_every": 0}, "update_every must be a whole number of update steps, 1 or more, got 0"),
        ({"update_every": 1.5}, "update_every must be a whole number of update steps"),
        ({"warmup": False, "power": 0.75}, "power=0.75 would have no effect"),
        ({"warmup": False, "inv_gamma": 2, "min_decay": 0.1}, "inv_gamma=2, min_decay=0.1 would have no effect"),
    ],
)
def test_what_is_out_of_range_or_without_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EMADecay(**settings)
