"""A table with a block in a plane, and a small denoiser: what the policy recipe wants of FetchPush and of lerobot,
without either. The block is a disc that the gripper pushes ahead of itself."""

from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

TOUCH = 0.05  # metres between gripper and block


class ToyTable:
    """As gymnasium's FetchPush: observations of the same layout, actions of four."""

    def reset(self, seed: int):
        random = np.random.default_rng(seed)
        self.block = np.array([*random.uniform(-0.1, 0.1, 2), 0.4])
        self.goal = np.array([*random.uniform(-0.1, 0.1, 2), 0.4])
        self.gripper = np.array([0.2, 0.2, 0.5])
        return self._seen(), {}

    def step(self, action):
        self.gripper = self.gripper + 0.04 * np.asarray(action[:3])
        self.gripper[2] = max(self.gripper[2], self.block[2])
        offset = self.block[:2] - self.gripper[:2]
        distance = np.linalg.norm(offset)
        if self.gripper[2] - self.block[2] < 0.04 and distance < TOUCH:
            self.block[:2] = self.gripper[:2] + TOUCH * offset / max(distance, 1e-9)
        success = np.linalg.norm(self.goal - self.block) < 0.05
        return self._seen(), 0.0, False, False, {"is_success": success}

    def _seen(self):
        seen = np.zeros(25)
        seen[0:3], seen[3:6], seen[6:9] = self.gripper, self.block, self.block - self.gripper
        return {"observation": seen, "achieved_goal": self.block.copy(), "desired_goal": self.goal.copy()}


class ToyPolicy(nn.Module):
    """Predicts the noise in actions ``(n, horizon, 3)``, through two residual blocks of Conv1d."""

    def __init__(self, shape):
        super().__init__()
        self.config, self.diffusion, self.chunk = SimpleNamespace(horizon=shape.horizon), self, shape.chunk
        width = shape.widths[0]
        self.enter = nn.Linear(2 * 21 + 3 + 1, width)
        blocks = (nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.Conv1d(width, width, 3, padding=1))
                  for _ in range(2))  # fmt: skip
        self.blocks = nn.ModuleList(blocks)
        self.leave = nn.Linear(width, 3)

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value) if name == "diffusion" else super().__setattr__(name, value)

    def _noise(self, noisy, batch, time):
        seen = torch.cat([batch["observation.state"], batch["observation.environment_state"]], -1).flatten(1)
        seen = torch.cat([seen, time[:, None]], 1)[:, None].expand(-1, noisy.shape[1], -1)
        hidden = self.enter(torch.cat([noisy, seen], -1)).transpose(1, 2)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.leave(hidden.transpose(1, 2))

    def forward(self, batch):
        noise, time = torch.randn_like(batch["action"]), torch.rand(len(batch["action"]))
        noisy = batch["action"] + time[:, None, None] * noise
        return F.mse_loss(self._noise(noisy, batch, time), noise), None

    def generate_actions(self, batch, noise):
        return (noise - self._noise(noise, batch, torch.ones(len(noise))))[:, 1 : 1 + self.chunk]
