"""A switch under FSDP2 needs one layer's whole weights beside the shards, however many layers there are."""

import json
from pathlib import Path

import forked
import pytest

WORKER = Path(__file__).with_name("fsdp_peak_worker.py")
SCHEDULE = "dense@0 factored@1 dense@2 adapter@3 factored@4 dense@5"
LAYER = 64 * 128 * 4  # bytes of the largest one
PARTS = 4 * (64 + 64) * 8 * 4 + 3 * (64 + 128) * 8 * 4  # bytes of what the decompositions of a block give


def switches(folder: Path, processes: int, blocks: int, moments: str) -> list[dict]:
    """Of every process, each with what it needs beyond the larger of the two phases."""
    folder.mkdir()
    settings = json.dumps({"blocks": blocks, "schedule": SCHEDULE, "moments": moments})
    result = forked.distributed(WORKER, folder, settings, processes=processes, timeout=400)
    assert result.returncode == 0, result.stderr[-6000:]
    rows = [row for rows in json.loads((folder / "seen.json").read_text()) for row in rows]
    assert [row["kind"] for row in rows[:5]] == ["factored", "dense", "adapter", "factored", "dense"]
    return [row | {"more": row["peak"] - max(row["before"], row["after"])} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "moments"),
    [
        (2, "project"),
        (2, "reset"),
        (4, "project"),
    ],
)
def test_a_switch_needs_one_whole_layer_beside_the_shards(tmp_path, processes, moments):
    """On the way W is decomposed, and formed, with copies of it and of its two moments; a process keeps the results of
    the layers that it has decomposed until their turn."""
    few = switches(tmp_path / "few", processes, 2, moments)
    many = switches(tmp_path / "many", processes, 6, moments)
    assert {row["wholes"] for row in few + many} == {1}
    for one, other in zip(few, many, strict=True):
        assert other["more"] <= 12 * LAYER
        assert other["more"] - one["more"] <= 4 * PARTS / processes + LAYER
