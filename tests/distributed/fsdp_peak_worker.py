"""One process under FSDP2 that counts what a switch allocates: fsdp_peak_worker.py FOLDER JSON."""

import json
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from hf_drt import DRTConfig, DynamicRank
from hf_drt.engines import fsdp2
from hf_drt.simulate.counter import StepCounter


class Counter(StepCounter):
    """Of tensors with data: until its turn a layer's outline stands for it."""

    def add(self, tensor):
        if not tensor.is_meta:
            super().add(tensor)


class Wholes:
    """How many layers are whole at once: those that the engine has gathered, while their weights are alive."""

    def __init__(self):
        self.most, self._alive = 0, []
        self._made, fsdp2._with_wholes = fsdp2._with_wholes, self

    def __call__(self, module, wholes):
        plain = self._made(module, wholes)
        self._alive = [group for group in self._alive if any(ref() is not None for ref in group)]
        self._alive.append([weakref.ref(p) for p in plain._parameters.values() if p is not None and p.ndim > 1])
        self.most = max(self.most, len(self._alive))
        return plain


def shards(model, optimizer) -> list[torch.Tensor]:
    states = (v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    return [*model.parameters(), *states]


def held(model, optimizer) -> int:
    counter = Counter()
    for tensor in shards(model, optimizer):
        counter.add(tensor)
    return counter.now


def main(folder: str, settings: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": settings["blocks"]}
    model = tiny.llama(**size)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    config = DRTConfig(schedule=settings["schedule"], rank=8, moments=settings["moments"])
    drt, rows = DynamicRank(model, config, len(settings["schedule"].split())), []
    drt.apply(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    wholes = Wholes()
    for step in range(drt.plan.max_steps):
        before, counter, wholes.most = held(model, optimizer), Counter(), 0
        for tensor in shards(model, optimizer):
            counter.add(tensor)
        with counter:
            drt.begin_step(step, optimizer)
        if step:
            row = {"before": before, "after": held(model, optimizer), "peak": counter.peak, "wholes": wholes.most}
            rows.append(row | {"kind": drt.plan.phases[drt.phase].kind})
        ids = torch.randint(1, tiny.VOCAB, (2, tiny.LENGTH), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rows)
    if dist.get_rank() == 0:
        Path(folder, "seen.json").write_text(json.dumps(gathered))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
