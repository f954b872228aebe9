"""Records of trained policies: intervals, what is found again, and the table."""

import json

import pytest
from policy_records import HEAD, Records, table, wilson


@pytest.mark.parametrize(("successes", "trials"), [(41, 50), (0, 50), (50, 50), (1, 7)])
def test_the_interval_is_where_the_test_of_a_share_rejects(successes, trials):
    """Wilson's bounds are the shares q that lie z deviations of themselves from what was seen."""
    for bound in wilson(successes, trials):
        distance = (successes / trials - bound) ** 2
        assert distance == pytest.approx(1.959964**2 * bound * (1 - bound) / trials, abs=1e-12)
    low, high = wilson(successes, trials)
    assert low - 1e-12 <= successes / trials <= high + 1e-12
    assert low < high


@pytest.mark.parametrize(("successes", "trials"), [(3, 2), (0, 0), (-1, 5)])
def test_shares_that_cannot_be_are_refused(successes, trials):
    with pytest.raises(ValueError, match=f"of {trials} trials {successes} cannot have succeeded"):
        wilson(successes, trials)


def results(**changes):
    return {"successes": 40, "rollouts": 50, "cpu_per_update": 0.2, "wall_per_update": 0.3, "chunk_ms": 50.4,
            "trained": [1000], "held_out_loss": 0.05, "loss": 0.04} | changes  # fmt: skip


def test_a_run_is_found_by_its_settings_alone(tmp_path):
    records = Records(tmp_path / "a" / "r.jsonl")
    records.add({"method": "dense", "seed": 0}, results())
    text = records.path.read_text()
    records.path.write_text(text + text[:40])  # a run that was killed while it wrote
    again = Records(records.path)
    assert again.find({"seed": 0, "method": "dense"})["successes"] == 40
    assert again.find({"method": "dense", "seed": 1}) is None
    again.add({"method": "dense", "seed": 1}, results(loss=1 / 3))
    assert len([json.loads(line) for line in records.path.read_text().splitlines()[::2]]) == 2
    assert again.all[-1]["loss"] == 0.333333


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"digest": 1\n{}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*r.jsonl is no JSON. Delete it"):
        Records(path)


def test_the_table_by_hand(tmp_path):
    records = Records(tmp_path / "r.jsonl")
    records.add({"method": "dense", "seed": 1}, results(successes=45))
    records.add({"method": "dense", "seed": 0}, results(held_out_loss=0.07))
    records.add({"method": "drift", "seed": 0}, results(cpu_per_update=0.25, trained=[900, 700, 500]))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(records.all).splitlines()]
    assert rows[0] == list(HEAD)
    low, high = wilson(85, 100)
    assert rows[2] == ["dense", "0.85", f"{low:.2f} to {high:.2f}", "0.80 0.90", "0.200", "1.00", "0.300", "50",
                       "1,000", "0.0600 ± 0.0141", "0.0400 ± 0.0000"]  # fmt: skip
    assert rows[3][4:9] == ["0.250", "1.25", "0.300", "50", "900 to 500"]
    assert rows[3][9] == "0.0500"
