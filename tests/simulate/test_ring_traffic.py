"""Bytes that a ring sends, and how long that takes, against a ring that is played through."""

import pytest

from hf_drt.simulate.processes.ring import KINDS, Collective, Ring, rounds, sent


def played(count: int, pieces: int) -> tuple[list[int], list[set[int]]]:
    """Pieces that each process of a ring sends in an all-gather, and what each has in the end."""
    have, passed = [{i} for i in range(count)], [0] * count
    for step in range(pieces - 1):
        for process in range(count):
            piece = (process - step) % count
            assert piece in have[process]
            have[(process + 1) % count] |= {piece}
            passed[process] += 1
    return passed, have


@pytest.mark.parametrize("count", [2, 3, 8])
def test_an_all_gather_sends_all_pieces_but_one(count):
    passed, have = played(count, count)
    assert have == [set(range(count))] * count
    assert passed == [rounds("all_gather", count)] * count
    assert sent("all_gather", 1000 * count, count) == pytest.approx(1000 * passed[0])


@pytest.mark.parametrize("count", [2, 4, 512])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(count):
    assert sent("all_reduce", 960, count) == sent("reduce_scatter", 960, count) + sent("all_gather", 960, count)
    assert sent("broadcast", 960, count) == pytest.approx(960 * (count - 1) / count)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_sends_nothing(kind):
    alone = Collective(kind, 1000, Ring(1, 1e9, 1e-3))
    assert (alone.sent, alone.seconds) == (0, 0)


def test_seconds_are_of_bytes_and_of_waiting():
    ring = Ring(4, 100.0, 0.5)
    assert Collective("all_gather", 400, ring).seconds == pytest.approx(300 / 100 + 3 * 0.5)
    assert Collective("all_reduce", 400, ring, calls=2).seconds == pytest.approx(600 / 100 + 2 * 6 * 0.5)
    assert Collective("all_gather", 400, ring).times(3).seconds == pytest.approx(3 * (3 + 1.5))
