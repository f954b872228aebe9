"""Which plan is proposed for a memory."""

from dataclasses import replace

import pytest

from hf_drt.simulate import Candidate, Space, fitting

DENSE = Candidate({"schedule": "dense@0"})
MANY = Space(range(2, 101))


def size_of(candidate: Candidate) -> int:
    """A made-up memory: a rotation holds less the more groups it has and the lower its rank."""
    settings = candidate.settings
    held = 1000
    if "groups=" in settings["schedule"]:
        groups = int(settings["schedule"].split("groups=")[1].rstrip(")"))
        held = 100 + 1000 // groups + round(1000 * settings.get("rank_ratio", 0))
    return held + (100 if candidate.checkpointing else 500)


@pytest.mark.parametrize(
    ("limit", "settings", "checkpointing", "trials"),
    [
        (1500, "--schedule dense@0", False, 1),
        (1100, "--schedule dense@0 --checkpointing", True, 2),
        (900, "--schedule 'rotate(groups=8)' --rank-ratio 0.125 --frozen-dtype bfloat16", False, None),
        (400, "--schedule 'rotate(groups=16)' --rank-ratio 0.125 --frozen-dtype bfloat16 --checkpointing", True, None),
    ],
)
def test_the_largest_rank_that_can_fit_with_the_fewest_groups(limit, settings, checkpointing, trials):
    tried, found = fitting(limit, DENSE, replace(MANY, ratios=(0.125,)) if limit == 900 else MANY, size_of)
    assert str(found) == settings
    assert found.checkpointing is checkpointing
    assert trials is None or len(tried) == trials
    assert [trial.fits for trial in tried] == [trial.peak <= limit for trial in tried]
    assert len({str(trial.candidate) for trial in tried}) == len(tried), "nothing is looked at twice"


def test_what_fits_at_a_rank_is_sought_there_before_a_lower_one():
    tried, found = fitting(600, DENSE, MANY, size_of)
    assert found.settings["rank_ratio"] == 0.25
    assert found.checkpointing
    assert {trial.candidate.settings.get("rank_ratio") for trial in tried} == {None, 0.25}


def test_nothing_fits():
    tried, found = fitting(10, DENSE, MANY, size_of)
    assert found is None
    assert [trial.candidate.settings.get("rank_ratio") for trial in tried] == [None, None, 0.25, 0.125, 0.0625]


def test_no_more_groups_than_layers():
    _, found = fitting(900, DENSE, Space(range(2, 6)), size_of)
    assert "groups=4" in found.settings["schedule"]
    _, found = fitting(1300, DENSE, Space(range(2, 4), (0.125,)), lambda c: 0 if "rotate" in str(c) else 9999)
    assert "groups=2" in found.settings["schedule"]


def test_with_checkpointing_of_the_whole_run_asked_for_nothing_is_tried_without_it_first():
    tried, found = fitting(1100, Candidate({"schedule": "dense@0"}, True), MANY, size_of)
    assert found.checkpointing
    assert len(tried) == 1


def test_where_layers_cannot_be_divided_no_turns_are_tried():
    tried, found = fitting(10, DENSE, Space(range(2, 2)), size_of)
    assert found is None
    assert [str(trial.candidate) for trial in tried] == ["--schedule dense@0", "--schedule dense@0 --checkpointing"]


def test_a_division_that_settings_decide_is_the_one_that_is_tried():
    tried, _ = fitting(10, DENSE, Space(range(7, 8), (0.25,)), size_of)
    assert [trial.candidate.settings["schedule"] for trial in tried[2:]] == ["rotate(groups=7)"]


def test_settings_that_cannot_stand_beside_those_given_are_not_proposed():
    _, found = fitting(800, DENSE, Space(range(2, 101), (None,), frozen_dtype=False, checkpointing=False), size_of)
    assert str(found) == "--schedule 'rotate(groups=8)'"
    tried, _ = fitting(10, DENSE, replace(MANY, checkpointing=False), size_of)
    assert not any(trial.candidate.checkpointing for trial in tried)
