"""One process of a run in which one dies: python -m torch.distributed.run --nproc_per_node 2 mortal.py FOLDER JSON

JSON: ``rank`` and ``place`` of the death, none without ``rank``; ``resume`` from the last checkpoint; other training
arguments.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "trainer"))

import conftest  # noqa: F401
import tiny
import torch
import torch.distributed as dist
from transformers import TrainerCallback
from writers import around_writes, killing

from hf_drt import DynamicRank


class At(TrainerCallback):
    """Calls a function in an update step."""

    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def kill(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    manager = signal.getsignal(signal.SIGTERM).__self__
    manager.kill_wait = 0
    os.kill(os.getpid(), signal.SIGTERM)
    while not manager.is_checkpoint_requested:
        time.sleep(0.001)


def arm(trainer, place: str) -> None:
    """Let this process die, or be told to end, at the place."""
    match place:
        case "step":
            trainer.add_callback(At(13, kill))
        case "switch":  # the other process waits in the broadcast of a decomposition
            apply = DynamicRank.apply

            def apply_and_die(controller, step, *args):
                if step == 16:
                    dist.broadcast = kill
                return apply(controller, step, *args)

            DynamicRank.apply = apply_and_die
        case "sigterm":
            trainer.add_callback(At(13, terminate))


def main(folder: str, settings: dict) -> None:
    torch.set_num_threads(1)
    rank, place, resume = (settings.pop(key, None) for key in ("rank", "place", "resume"))
    trainer = tiny.trainer(
        Path(folder), use_cpu=True, ddp_backend="gloo", save_strategy="steps", save_steps=5, **settings
    )
    dies = rank == dist.get_rank()
    if dies:
        arm(trainer, place)
    file = place.removeprefix("saving ") if dies and place.startswith("saving ") else None
    with around_writes("checkpoint-15", killing(file, "within")):
        trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), Path(folder, "final.pt"))
        torch.save(trainer.optimizer.state_dict(), Path(folder, "optimizer.pt"))
        Path(folder, "last").write_text(str(trainer.state.global_step))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
