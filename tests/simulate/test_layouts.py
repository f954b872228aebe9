"""What a process holds and sends under each engine, by hand on a model of a few weights."""

import re

import pytest
import tiny
import torch

from hf_drt.simulate import MACHINES, layout_for
from hf_drt.simulate.processes import Entry, Inventory, inventory

H100 = MACHINES["h100"]
# A block of a trained and a frozen weight, another block, and a head that is kept; 3 rows on 4 shards are 4.
BIG, BASE, NEXT, HEAD = (
    Entry("0.w", (8, 100_000), torch.float32, True, 0),
    Entry("0.base", (8, 100_000), torch.float32, False, 0),
    Entry("1.v", (3, 100_000), torch.float32, True, 1),
    Entry("head", (8, 5), torch.float32, True, 2),
)
HAVE = Inventory((BIG, BASE, NEXT, HEAD), frozenset({2, 3}), buffers=48)
TRAINED = 4 * (800_000 + 300_000 + 40)
ALL = TRAINED + 4 * 800_000


def sends(engine, accumulation=1, mixed=False, shards=None):
    found = {}
    for c in layout_for(engine, 4, mixed, shards).update(HAVE, accumulation, H100):
        found[c.kind] = found.get(c.kind, 0) + c.sent
    return found


@pytest.mark.parametrize("accumulation", [1, 3])
def test_ddp_reduces_once_whatever_is_accumulated(accumulation):
    assert sends("ddp", accumulation) == {"all_reduce": TRAINED * 3 / 2, "broadcast": 48 * 3 / 4}
    held = layout_for("ddp", 4).held(HAVE, accumulation)
    assert (held.weights, held.gradients, held.sending, held.gathered) == (ALL + 48, TRAINED, TRAINED, 0)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_fsdp2_gathers_twice_in_every_pass_and_reduces_once(accumulation):
    padded = 4 * (800_000 + 800_000 + 400_000)  # the three rows of v are four
    gathered = (2 * padded + 4 * 40) * accumulation
    reduced = 4 * (800_000 + 400_000 + 40)
    found = sends("fsdp2", accumulation)
    assert found == {"all_gather": pytest.approx(gathered * 3 / 4), "reduce_scatter": pytest.approx(reduced * 3 / 4)}


def test_fsdp2_accumulates_whole_gradients():
    one, three = (layout_for("fsdp2", 4).held(HAVE, n) for n in (1, 3))
    assert one.gradients == 4 * (200_000 + 100_000 + 10)
    assert three.gradients == one.gradients + TRAINED
    assert one.weights == 4 * (400_000 + 100_000 + 10) + 48
    assert one.gathered == 4 * (1_600_000 + 400_000 + 40)  # the head is kept, and both blocks are on their way
    assert one.sending == 2 * 4 * 800_000


def test_mixed_precision_halves_what_fsdp2_sends_and_not_what_it_keeps():
    whole, half = sends("fsdp2"), sends("fsdp2", mixed=True)
    assert {kind: size / 2 for kind, size in whole.items()} == half
    assert layout_for("fsdp2", 4, True).held(HAVE, 1).weights == layout_for("fsdp2", 4).held(HAVE, 1).weights


def test_hsdp_gathers_among_shards_and_averages_among_replicas():
    found = sends("hsdp", shards=2)
    padded = 4 * (800_000 + 800_000 + 400_000)
    reduced = 4 * (800_000 + 400_000 + 40)
    assert found["all_gather"] == pytest.approx((2 * padded + 160) / 2)
    assert found["reduce_scatter"] == pytest.approx(reduced / 2)
    assert found["all_reduce"] == pytest.approx(reduced / 2)  # 2 n (p - 1) / p of half of them, p = 2


def test_zero_1_reduces_once_and_zero_2_in_every_pass():
    assert sends("zero1", 3) == {"all_reduce": TRAINED * 3 / 2, "all_gather": TRAINED * 3 / 4}
    assert sends("zero2", 3) == {"all_reduce": 3 * TRAINED * 3 / 2, "all_gather": TRAINED * 3 / 4}
    one, two = (layout_for(engine, 4).held(HAVE, 1) for engine in ("zero1", "zero2"))
    assert (one.gradients, two.gradients) == (TRAINED, TRAINED // 4)
    assert one.weights == ALL + 48 + TRAINED // 4  # whole, and the part that is updated


def test_zero_3_cuts_without_regard_to_rows_and_keeps_small_weights():
    gathered = 4 * (800_000 + 800_000 + 300_000)
    found = sends("zero3", 2)
    assert found["all_gather"] == pytest.approx((4 * gathered + 160) * 3 / 4)
    assert found["reduce_scatter"] == pytest.approx(2 * TRAINED * 3 / 4)
    held = layout_for("zero3", 4).held(HAVE, 1)
    assert held.weights == (ALL + TRAINED) // 4 + 160 + 48
    assert layout_for("zero3", 4, True).held(HAVE, 1).weights == ALL // 8 + TRAINED // 4 + 80 + 48


@pytest.mark.parametrize(("tied", "kept"), [(False, {"model.norm.weight", "lm_head.weight"}),
                                            (True, {"model.norm.weight", "model.embed_tokens.weight"})])  # fmt: skip
def test_units_are_those_of_accelerate(tied, kept):
    have = inventory(tiny.llama(tie_word_embeddings=tied))
    units = [{entry.name for entry in unit} for unit in have.by_unit().values()]
    blocks = [unit for unit in units if all(".layers." in name for name in unit)]
    assert [len(block) for block in blocks] == [9, 9]
    assert {e.name for e in have.entries if e.unit in have.kept} == kept
    assert len(units) == (3 if tied else 4)


def test_an_optimizer_holds_its_part():
    assert [tuple(p.shape) for p in layout_for("fsdp2", 4).state_of(HAVE)] == [(2, 100_000), (1, 100_000), (2, 5)]
    assert [tuple(p.shape) for p in layout_for("zero3", 4).state_of(HAVE)] == [(275_010,)]
    assert len(layout_for("ddp", 4).state_of(HAVE)) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gspmd", 4), "'gspmd' is not an engine that is known; allowed are ddp, fsdp2, hsdp, zero1, zero2, zero3"),
        (("ddp", 1), "processes must be at least 2, got 1"),
        (("hsdp", 4), "engine 'hsdp' needs shards"),
        (("fsdp2", 4, False, 2), "shards=2 has no effect with engine 'fsdp2'. Take hsdp, or leave it out"),
        (("hsdp", 12, False, 5), "be more than 1 and fewer than all (2, 3, 4, 6), got 5. For 1 take ddp"),
        (("hsdp", 3, False, 3), "(none is), got 3"),
    ],
)
def test_refused(words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        layout_for(*words)
