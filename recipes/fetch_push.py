"""FetchPush: an arm pushes a block over a table to a goal. The environment of gymnasium-robotics, with states for a
policy, an expert that is a script, its demonstrations, and roll-outs of many environments at a time.

The expert (:func:`expert_action`) goes above a point behind the block, as seen from the goal, down, and pushes: a law
of the state alone, so that it can take over anywhere.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from missing_extra import wanted

STEPS = 50
"""Control steps of an episode, 25 a second."""
ROBOT, SURROUNDINGS, ACTIONS = 6, 15, 3
"""Sizes of a state's two parts (:func:`state_of`), and of an action: x, y and z of the gripper, each in [-1, 1]."""
_ENVIRONMENT = "FetchPush-v4"
_BEHIND, _ABOVE, _NEAR = 0.075, 0.08, 0.02  # metres
_GAIN, _PUSH = 10.0, 12.0  # of a way in metres: the action that makes it in about a step; the speed of a push

Observation = dict[str, np.ndarray]
Chunks = Callable[[np.ndarray, Sequence[int]], np.ndarray]
"""From the last two states ``(n, 2, 21)`` of some environments, and their numbers, the next actions ``(n, k, 3)``."""


@dataclass(frozen=True)
class Episode:
    """What was seen and what the expert did: ``states (T, 21)``, ``actions (T, 3)``, both float32."""

    states: np.ndarray
    actions: np.ndarray


@dataclass(frozen=True)
class Rollouts:
    """Of each environment: whether the block lay at its goal at the end, and at which step the expert took over."""

    success: np.ndarray
    taken_over: np.ndarray
    taught: tuple[Episode, ...]
    """What the expert did from there on."""


def make_environment() -> Any:
    """FetchPush with a sparse reward and :data:`STEPS` steps.

    Raises:
        SystemExit: A package is missing.
    """
    gymnasium = wanted("gymnasium", "policy")
    gymnasium.register_envs(wanted("gymnasium_robotics", "policy"))
    return gymnasium.make(_ENVIRONMENT, max_episode_steps=STEPS)


def state_of(observation: Observation) -> np.ndarray:
    """What the policy sees, ``(21,)``: of the gripper its place and speed; of the block its place, the way from the
    gripper, its angles, and the goal itself and from the block. The fingers are shut, and left out."""
    seen, goal = observation["observation"], observation["desired_goal"]
    gripper, block, way, angles, speed = seen[0:3], seen[3:6], seen[6:9], seen[11:14], seen[20:23]
    return np.concatenate([gripper, speed, block, way, angles, goal, goal - block]).astype(np.float32)


def expert_action(observation: Observation) -> np.ndarray:
    """The action ``(3,)`` of the scripted expert in a state."""
    gripper, block = observation["observation"][0:3], observation["observation"][3:6]
    way = observation["desired_goal"][:2] - block[:2]
    left = float(np.linalg.norm(way))
    ahead = way / max(left, 1e-6)
    aside = np.array([-ahead[1], ahead[0]])
    offset = gripper[:2] - block[:2]
    along, across = float(offset @ ahead), float(offset @ aside)
    start, height = block[:2] - _BEHIND * ahead, gripper[2] - block[2]
    if left < 0.015:
        move, rise = np.zeros(2), 0.0
    elif along < -0.03 and abs(across) < _NEAR and height < 0.03:
        move, rise = min(1.0, _PUSH * left + 0.05) * ahead - _GAIN * across * aside, -height
    elif np.linalg.norm(gripper[:2] - start) < _NEAR:
        move, rise = _GAIN * (start - gripper[:2]), -height
    else:  # above the block and to the place behind it; straight up first where the block is in the way
        lifted = height > 0.06 or along < -0.06
        move, rise = _GAIN * (start - gripper[:2]) * lifted, _ABOVE - height
    return np.clip([*move, _GAIN * rise], -1, 1).astype(np.float32)


def _step(environment: Any, action: np.ndarray) -> tuple[Observation, bool]:
    observation, _, _, _, info = environment.step(np.append(np.clip(action, -1, 1), 0).astype(np.float32))
    return observation, bool(info["is_success"])


# ---- demonstrations


@dataclass(frozen=True)
class Demonstrations:
    """Which demonstrations are made.

    Attributes:
        count: Episodes in which the expert succeeds; others are left out.
        noise: Deviation of what is added to the expert's actions when they are carried out, but not when they are
            recorded, so that states beside its way are seen (Laskey et al. 2017).
        first_seed: Of the environment in the first episode; others follow.
    """

    count: int = 100
    noise: float = 0.2
    first_seed: int = 0

    def path(self, folder: Path) -> Path:
        """The file in a cache folder."""
        text = json.dumps([_ENVIRONMENT, STEPS, asdict(self)], sort_keys=True)
        return folder / f"fetch_push_{hashlib.sha256(text.encode()).hexdigest()[:12]}.npz"

    def load(self, folder: Path) -> list[Episode]:
        """From the cache folder; made there first if they are not in it."""
        path = self.path(folder)
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            episodes = self._made()
            part = path.with_suffix(".part.npz")
            np.savez(part, **{n: np.stack([getattr(e, n) for e in episodes]) for n in ("states", "actions")})
            part.replace(path)
        with np.load(path) as kept:
            return [Episode(states, actions) for states, actions in zip(kept["states"], kept["actions"], strict=True)]

    def _made(self) -> list[Episode]:
        environment, episodes, seed = make_environment(), [], self.first_seed
        while len(episodes) < self.count:
            episode, success = demonstrate(environment, seed, self.noise)
            episodes += [episode] if success else []
            seed += 1
        return episodes


def demonstrate(environment: Any, seed: int, noise: float = 0.0) -> tuple[Episode, bool]:
    """One episode of the expert, and whether it succeeded."""
    random = np.random.default_rng(seed)
    observation, _ = environment.reset(seed=seed)
    states, actions, success = [], [], False
    for _ in range(STEPS):
        states.append(state_of(observation))
        actions.append(expert_action(observation))
        observation, success = _step(environment, actions[-1] + noise * random.standard_normal(ACTIONS))
    return Episode(np.stack(states), np.stack(actions)), success


# ---- roll-outs


class Arena:
    """Environments that are rolled out together, so that the policy sees them as one batch; made at first use."""

    def __init__(self) -> None:
        self._environments: list[Any] = []

    def roll_out(self, chunks: Chunks, seeds: Sequence[int], takes_over: float = 0.0, draw: int = 0) -> Rollouts:
        """Roll a policy out in an environment for each seed.

        Args:
            chunks: The policy. Of the actions that it gives all are carried out before it is asked again.
            seeds: Of the environments.
            takes_over: Probability that the expert takes over at the beginning of a chunk; it keeps going to the end.
            draw: Seed of these draws.
        """
        while len(self._environments) < len(seeds):
            self._environments.append(make_environment())
        runs = [_Run(e, s) for e, s in zip(self._environments, seeds, strict=False)]
        random = np.random.default_rng(draw)
        while runs[0].step < STEPS:
            for run in runs:
                run.expert |= random.random() < takes_over
            led = [i for i, run in enumerate(runs) if not run.expert]
            planned = chunks(np.stack([runs[i].window() for i in led]), led) if led else np.zeros((0, 4, ACTIONS))
            plan = dict(zip(led, planned, strict=True))
            for k in range(min(planned.shape[1], STEPS - runs[0].step)):
                for i, run in enumerate(runs):
                    run.go(plan[i][k] if i in plan else None)
        taught = tuple(Episode(np.stack(r.seen), np.stack(r.done)) for r in runs if r.done)
        return Rollouts(np.array([r.success for r in runs]), np.array([STEPS - len(r.done) for r in runs]), taught)


class _Run:
    """One environment on its way."""

    def __init__(self, environment: Any, seed: int):
        self.environment, self.step, self.success, self.expert = environment, 0, False, False
        self.observation, _ = environment.reset(seed=seed)
        self.now = self.before = state_of(self.observation)
        self.seen: list[np.ndarray] = []
        self.done: list[np.ndarray] = []

    def window(self) -> np.ndarray:
        return np.stack([self.before, self.now])

    def go(self, action: np.ndarray | None) -> None:
        """Carry out an action, or the expert's."""
        if action is None:
            action = expert_action(self.observation)
            self.seen.append(self.now)
            self.done.append(action)
        self.observation, self.success = _step(self.environment, action)
        self.before, self.now = self.now, state_of(self.observation)
        self.step += 1


def expert_chunks(length: int = 1) -> Chunks:
    """For a look at the expert alone: never asked where it takes over with probability 1."""
    return lambda states, numbers: np.zeros((len(numbers), length, ACTIONS), np.float32)
