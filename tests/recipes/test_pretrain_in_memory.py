"""The recipe that trains in turns under a limit on memory."""

import pretrain_in_memory as recipe
import pytest

from hf_drt import Run, Schedule

SMALL = (
    "--hidden_size", "512", "--intermediate_size", "1024", "--layers", "8", "--vocab_size", "1024", "--block_size",
    "384", "--groups", "4", "--max_texts", "40",
)  # fmt: skip


@pytest.mark.parametrize("steps", [2, 3, 7])
@pytest.mark.parametrize("method", ["dense", "checkpointed", "forms", "rotate"])
def test_every_phase_has_as_many_updates(method, steps):
    options = recipe.Options(groups=8, steps=steps)
    length = steps * options.phases(method)
    plan = Schedule.parse(options.schedule(method)).resolve(Run(length), "factored")
    assert [phase.start for phase in plan.phases] == list(range(0, length, steps))


def test_settings_are_given_where_they_act():
    options = recipe.Options(frozen_dtype="bfloat16", dense_checkpointing=True, recompute=True)
    common = {"schedule", "log_rank_steps"}
    assert set(options.settings("dense")) == set(options.settings("checkpointed")) == common
    assert set(options.settings("forms")) == common | {"rank_ratio", "recompute", "frozen_dtype"}
    assert set(options.settings("rotate")) == set(options.settings("forms")) | {"start", "dense_checkpointing"}
    assert "frozen_dtype" not in recipe.Options(after="adapter", frozen_dtype="bfloat16").settings("rotate")


def test_the_first_update_of_a_phase_is_counted_apart():
    rows = [
        {"phase": phase, "seconds": seconds, "weights": 1, "gradients": 2, "optimizer": 4, "live": live}
        for phase, seconds, live in ((0, 9.0, 90), (0, 2.0, 20), (0, 4.0, 30), (1, 5.0, 50), (1, 1.0, 10))
    ]
    first, second = recipe.by_phase(rows)
    assert first == {"held": 7, "live": 30, "switch": 90, "seconds": 3.0, "switch_seconds": 6.0}
    assert (second["live"], second["seconds"]) == (10, 1.0)


def test_a_mixture_of_forms_takes_its_share_of_each():
    options = recipe.Options(groups=4)
    assert recipe.mixture(options, 8.0, 2.0, 6.0, 0) == 2.0
    assert recipe.mixture(options, 8.0, 2.0, 6.0, 1) == (8 + 3 * 2) / 4
    assert recipe.mixture(options, 8.0, 2.0, 6.0, 4) == (8 + 3 * 6) / 4
    assert recipe.mixture(recipe.Options(groups=4, after="lowrank"), 8.0, 2.0, 6.0, 4) == (8 + 3 * 2) / 4


def test_a_single_update_per_phase_is_refused():
    with pytest.raises(ValueError, match="--steps must be at least 2, since the first of a phase is not timed, got 1"):
        recipe.main(["--steps", "1"])


@pytest.mark.slow
def test_turns_train_where_dense_training_fails(capsys):
    assert recipe.main([*SMALL]) == 0
    said = capsys.readouterr().out
    assert "dense: fails, out of memory" in said
    assert "rotate: runs through" in said
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows[:3]] == ["| dense", "| dense, checkpointed", "| factored"]
    assert int(rows[1][1]) == int(rows[0][1])
    assert int(rows[1][4]) < int(rows[0][4])
    for row in rows[:1] + rows[2:]:  # bytes as predicted, to a MiB
        assert abs(int(row[1]) - int(row[3])) <= 1
        assert abs(int(row[4]) - int(row[6])) <= 1
