"""lerobot's DiffusionPolicy (Chi et al. 2023, arXiv 2303.04137) on states: a U-Net of Conv1d over the actions to come,
conditioned on the last two states, with a DDIM scheduler; windows of demonstrations for its training.

lerobot 0.4.4 asks for other versions of torch and huggingface_hub, so that it is installed without its dependencies;
those that its diffusion policy needs are in the extra `policy`.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from fetch_push import ACTIONS, ROBOT, SURROUNDINGS, Chunks, Episode
from missing_extra import wanted
from torch import Tensor, nn

SEEN = 2
"""States that a policy sees: the last and the one before."""
_LEROBOT = "pip install --no-deps lerobot==0.4.4"


@dataclass(frozen=True)
class Shape:
    """Sizes of a policy.

    Attributes:
        widths: Channels of the U-Net by level; each level but the last halves the length.
        kernel: Of its convolutions.
        horizon: Actions that it predicts, the first of which belongs to the state before the last.
        chunk: Actions that are carried out before it is asked again.
        denoising: DDIM steps of a prediction.
        predicts: What the U-Net gives: the actions ("sample"), or the noise in them ("epsilon").
    """

    widths: tuple[int, ...] = (128, 256)
    kernel: int = 3
    horizon: int = 8
    chunk: int = 4
    denoising: int = 10
    predicts: str = "sample"


def diffusion_policy_module() -> ModuleType:
    """lerobot's module of the diffusion policy.

    Raises:
        SystemExit: lerobot, or a package that it imports, is missing.
    """
    root = importlib.util.find_spec("lerobot")
    if root is not None and root.origin is not None:
        _import_torchvision()
        # The __init__ of lerobot.policies imports all policies, of which GR00T fails under transformers 5: a
        # dataclass field without a default after those of PreTrainedConfig.
        package = ModuleType("lerobot.policies")
        package.__path__ = [str(Path(root.origin).parent / "policies")]
        sys.modules.setdefault("lerobot.policies", package)
    return wanted("lerobot.policies.diffusion.modeling_diffusion", "policy", _LEROBOT)


def _import_torchvision() -> None:
    """Import torchvision; where its compiled operators are of another build than torch (a wheel for CUDA beside torch
    for the CPU) its import ends at two of them, which are declared then. A policy without images calls none."""
    try:
        wanted("torchvision", "policy", _LEROBOT)
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
        importlib.import_module("torchvision")


def new_policy(shape: Shape) -> nn.Module:
    """A DiffusionPolicy from scratch, for states and actions of :mod:`fetch_push`.

    Raises:
        ValueError: A size does not fit the others.
    """
    if shape.chunk > shape.horizon - SEEN + 1:
        raise ValueError(
            f"a chunk of {shape.chunk} actions does not fit a horizon of {shape.horizon}, of which the first belongs "
            f"to the state before the last: it may hold {shape.horizon - SEEN + 1} at most."
        )
    module = diffusion_policy_module()
    types = sys.modules["lerobot.configs.types"]
    feature = types.PolicyFeature
    config = module.DiffusionConfig(
        input_features={
            "observation.state": feature(types.FeatureType.STATE, (ROBOT,)),
            "observation.environment_state": feature(types.FeatureType.ENV, (SURROUNDINGS,)),
        },
        output_features={"action": feature(types.FeatureType.ACTION, (ACTIONS,))},
        n_obs_steps=SEEN, horizon=shape.horizon, n_action_steps=shape.chunk, down_dims=shape.widths,
        kernel_size=shape.kernel, noise_scheduler_type="DDIM", num_inference_steps=shape.denoising,
        prediction_type=shape.predicts, device="cpu",
    )  # fmt: skip
    return module.DiffusionPolicy(config)


# ---- data


@dataclass(frozen=True)
class Scale:
    """States to [-1, 1], by the smallest and largest of the demonstrations; as lerobot does by default."""

    least: Tensor
    most: Tensor

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> "Scale":
        states = torch.from_numpy(np.concatenate([episode.states for episode in episodes]))
        return cls(states.amin(0), states.amax(0))

    def __call__(self, states: Tensor) -> Tensor:
        return 2 * (states - self.least) / (self.most - self.least).clamp_min(1e-3) - 1

    def inputs(self, states: Tensor) -> dict[str, Tensor]:
        """What the policy wants of states ``(n, 2, 21)``."""
        scaled = self(states)
        return {"observation.state": scaled[..., :ROBOT], "observation.environment_state": scaled[..., ROBOT:]}


class Windows:
    """Windows of episodes: two states, and the actions from the first of them on, ``horizon`` of them.

    At the ends of an episode its first state and its last action are repeated, as lerobot does it.
    """

    def __init__(self, episodes: Sequence[Episode], horizon: int, scale: Scale):
        self.horizon, self.scale = horizon, scale
        self.states = torch.zeros(0, SEEN, ROBOT + SURROUNDINGS)
        self.actions = torch.zeros(0, horizon, ACTIONS)
        self.add(episodes)

    def __len__(self) -> int:
        return len(self.states)

    def add(self, episodes: Sequence[Episode]) -> None:
        """Take further episodes in, whatever their length."""
        for episode in episodes:
            last = len(episode.actions) - 1
            starts = torch.arange(-1, last)[:, None]
            seen = (starts + torch.arange(SEEN)).clamp(0, last)
            done = (starts + torch.arange(self.horizon)).clamp(0, last)
            self.states = torch.cat([self.states, torch.from_numpy(episode.states)[seen]])
            self.actions = torch.cat([self.actions, torch.from_numpy(episode.actions)[done]])

    def batch(self, numbers: Tensor) -> dict[str, Tensor]:
        """The batch of some windows, as the policy's ``forward`` wants it."""
        actions = self.actions[numbers]
        padding = torch.zeros(actions.shape[:2], dtype=torch.bool)
        return self.scale.inputs(self.states[numbers]) | {"action": actions, "action_is_pad": padding}


def chunks_of(policy: Any, scale: Scale, generator: torch.Generator) -> Chunks:
    """The policy as roll-outs want it; the noise that it begins with comes of ``generator``."""
    shape = (policy.config.horizon, ACTIONS)

    @torch.no_grad()
    def chunks(states: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        noise = torch.randn(len(states), *shape, generator=generator)
        return policy.diffusion.generate_actions(scale.inputs(torch.from_numpy(states)), noise=noise).numpy()

    return chunks
