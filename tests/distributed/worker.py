"""One process of a distributed run: python -m torch.distributed.run --nproc_per_node 2 worker.py FOLDER JSON

Trains, checks after every step that all processes hold the same bits, counts all-reduces, and writes what it saw.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import tiny
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_drt import dense_state_dict


def digest(model) -> str:
    sha = hashlib.sha256()
    for name, p in sorted(model.state_dict().items()):
        sha.update(name.encode() + p.float().numpy().tobytes())
    return sha.hexdigest()


class Watch(TrainerCallback):
    """Compares the processes after every step and counts reductions per update."""

    def __init__(self):
        self.trainer = None
        self.equal, self.reductions, self.ddp_ids = [], [], set()
        self._count = 0

    def hook(self, state, bucket):
        self._count += 1
        return default_hooks.allreduce_hook(None, bucket)

    def on_train_begin(self, args, state, control, **kwargs):
        if isinstance(self.trainer.model_wrapped, DistributedDataParallel):
            self.trainer.model_wrapped.register_comm_hook(None, self.hook)

    def on_step_end(self, args, state, control, **kwargs):
        wrapped = self.trainer.model_wrapped
        self.ddp_ids.add(id(wrapped))
        if dist.is_initialized():
            digests = [None] * dist.get_world_size()
            dist.all_gather_object(digests, digest(self.trainer.model))
            self.equal.append(len(set(digests)) == 1)
        self.reductions.append(self._count)
        self._count = 0


def main(folder: str, settings: dict) -> None:
    torch.set_num_threads(1)
    resume = settings.pop("resume", None)
    model = tiny.llama(attention_dropout=settings.pop("dropout", 0.1))
    watch = Watch()
    if "RANK" in os.environ:
        settings["ddp_backend"] = "gloo"
    trainer = tiny.trainer(Path(folder), model=model, use_cpu=True, **settings)
    trainer.add_callback(watch)
    watch.trainer = trainer
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), Path(folder, "final.pt"))
        torch.save(dense_state_dict(trainer.model), Path(folder, "dense.pt"))
        torch.save(trainer.optimizer.state_dict(), Path(folder, "optimizer.pt"))
        seen = {"equal": watch.equal, "reductions": watch.reductions, "ddp_objects": len(watch.ddp_ids)}
        Path(folder, "seen.json").write_text(json.dumps(seen | {"history": trainer.state.log_history}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
