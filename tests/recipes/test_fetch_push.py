"""The pushing task: its expert, demonstrations, roll-outs and windows, on a toy table; the real one is marked slow."""

import fetch_push
import numpy as np
import pytest
import torch
from fetch_push import ROBOT, STEPS, SURROUNDINGS, Arena, Demonstrations, Episode, demonstrate, expert_chunks, state_of
from lerobot_policy import Scale, Windows
from toy_policy import ToyTable

SEEDS = range(12)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(fetch_push, "make_environment", ToyTable)


def resting(states: np.ndarray, numbers) -> np.ndarray:
    return np.zeros((len(numbers), 4, 3), np.float32)


def test_the_expert_succeeds_and_one_who_rests_does_not(table):
    arena = Arena()
    taken_over = arena.roll_out(expert_chunks(), SEEDS, takes_over=1.0)
    left = arena.roll_out(resting, SEEDS)
    assert taken_over.success.all()
    assert not taken_over.taken_over.any()
    begun = [np.linalg.norm(seen["desired_goal"] - seen["achieved_goal"]) < 0.05
             for seen, _ in (ToyTable().reset(seed) for seed in SEEDS)]  # fmt: skip
    assert left.success.tolist() == begun
    assert sum(begun) < len(SEEDS) / 2
    assert left.taught == ()
    assert (left.taken_over == STEPS).all()


def test_the_expert_that_takes_over_goes_on_from_where_the_policy_has_come(table):
    """Each chunk of 4 it begins with probability 1/4: what it did is in the episode, and only that."""
    rollouts = Arena().roll_out(resting, SEEDS, takes_over=0.25, draw=3)
    begun = rollouts.taken_over[rollouts.taken_over < STEPS]
    assert len(set(begun)) > 2
    assert (begun % 4 == 0).all()
    assert [len(episode.actions) for episode in rollouts.taught] == (STEPS - begun).tolist()
    environment, episode = ToyTable(), rollouts.taught[0]
    observation, _ = environment.reset(
        next(s for s, step in zip(SEEDS, rollouts.taken_over, strict=True) if step < STEPS)
    )
    for step in range(STEPS):  # by hand: at rest, then the expert
        action = fetch_push.expert_action(observation) if step >= begun[0] else np.zeros(3)
        if step >= begun[0]:
            np.testing.assert_array_equal(episode.states[step - begun[0]], state_of(observation))
            np.testing.assert_array_equal(episode.actions[step - begun[0]], action)
        observation, *_ = environment.step(action)


def test_demonstrations_are_made_once_and_are_those_of_their_settings(table, tmp_path, monkeypatch):
    wanted = Demonstrations(count=3, noise=0.1)
    made = wanted.load(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [wanted.path(tmp_path).name]
    assert Demonstrations(count=4, noise=0.1).path(tmp_path) != wanted.path(tmp_path)
    monkeypatch.setattr(fetch_push, "demonstrate", None)
    again = wanted.load(tmp_path)
    assert all(np.array_equal(a.states, b.states) and np.array_equal(a.actions, b.actions)
               for a, b in zip(made, again, strict=True))  # fmt: skip


def test_noise_is_carried_out_and_not_recorded():
    (calm, _), (rough, _) = (demonstrate(ToyTable(), 1, noise) for noise in (0.0, 0.3))
    np.testing.assert_array_equal(calm.actions[0], rough.actions[0])
    np.testing.assert_array_equal(calm.states[0], rough.states[0])
    assert not np.array_equal(calm.states[1], rough.states[1])


def test_windows_hold_two_states_and_the_actions_from_the_first_on():
    """By hand, an episode of 5 steps whose state and action t are t: at its ends the first and the last repeat."""
    count = np.arange(5, dtype=np.float32)[:, None]
    episode = Episode(np.repeat(count, ROBOT + SURROUNDINGS, 1), np.repeat(count, 3, 1))
    windows = Windows([episode], 4, Scale.of([episode]))
    assert windows.states[:, :, 0].tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [3, 4]]
    assert windows.actions[:, :, 0].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 4], [3, 4, 4, 4]]
    batch = windows.batch(torch.tensor([4]))
    assert batch["observation.state"].shape == (1, 2, ROBOT)
    assert batch["observation.environment_state"][0, :, 0].tolist() == [0.5, 1.0]  # of 0 to 4: to [-1, 1]
    windows.add([Episode(episode.states[:2], episode.actions[:2])])
    assert len(windows) == 7


def test_without_its_package_the_environment_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium", None)
    with pytest.raises(SystemExit, match=r"wants gymnasium, which is not installed.* pip install -e '.\[policy\]'"):
        fetch_push.make_environment()


@pytest.mark.slow
def test_the_expert_in_the_real_environment():
    """Needs the extra `policy`."""
    pytest.importorskip("gymnasium_robotics", reason="pip install -e '.[policy]'")
    assert Arena().roll_out(expert_chunks(), range(20), takes_over=1.0).success.mean() >= 0.95
