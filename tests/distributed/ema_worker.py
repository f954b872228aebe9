"""One process of a run whose weights are averaged: ema_worker.py FOLDER '{SETTING: ...}'. What it saw goes there."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import tiny
import torch
import torch.distributed as dist

from hf_drt import DRTTrainer, EMACallback, EMADecay

folder, settings = Path(sys.argv[1]), json.loads(sys.argv[2])
callback = EMACallback(EMADecay(0.7, warmup=False), evaluate=True, export=settings.pop("export", False))
equal = []


class Watched(DRTTrainer):
    def training_step(self, *args, **kwargs):
        if callback.ema is not None and callback.ema.updates:
            equal.append(all(map(same, callback.ema.state_dict()["averages"].values())))
        return super().training_step(*args, **kwargs)


def same(tensor: torch.Tensor) -> bool:
    """Whether all processes hold the same bits."""
    first = tensor.clone()
    dist.broadcast(first, 0)
    answer = torch.tensor(int(torch.equal(first, tensor)))
    dist.all_reduce(answer, dist.ReduceOp.MIN)
    return bool(answer)


trainer = tiny.trainer(folder, tiny.llama(), cls=Watched, use_cpu=True, **settings)
trainer.add_callback(callback)
trainer.train()
averages = callback.ema.state_dict()["averages"]
equal.append(all(map(same, averages.values())))
if trainer.is_world_process_zero():
    torch.save(dict(averages), folder / "average.pt")
    files = [str(path.relative_to(folder)) for path in folder.rglob("drt_ema*")]
    seen = {"equal": equal, "files": files, "history": trainer.state.log_history, "updates": callback.ema.updates}
    (folder / "seen.json").write_text(json.dumps(seen))
dist.barrier()
dist.destroy_process_group()
