"""One process of a hand-written loop under FSDP2, or alone: fsdp_worker.py FOLDER JSON

Trains a tiny Llama through every form on the same global batches, however many processes there are, and writes losses,
the dense weights after every phase, and what it saw of the sharding.
"""

import gc
import json
import os
import sys
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import tiny
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_drt import DRTConfig, DynamicRank
from hf_drt.engines.fsdp2 import gathered
from hf_drt.forms import effective_weight, trainable_weights

STEPS, ROWS, ACCUMULATION = 12, 8, 2


def shard(model) -> None:
    """Every decoder layer a unit, and the rest one more."""
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)


def rows_of(step: int, rank: int, world: int) -> torch.Tensor:
    """This process's share of a global batch, cut into micro-batches: (accumulation, rows, length)."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, tiny.VOCAB, (ACCUMULATION, ROWS, tiny.LENGTH), generator=generator)
    return ids[:, rank * ROWS // world : (rank + 1) * ROWS // world]


def dense_weights(model, targets) -> dict[str, torch.Tensor]:
    whole = {name: effective_weight(gathered(model.get_submodule(name))).clone() for name in targets}
    rest = {
        name: p for name, p in model.named_parameters() if name.rpartition(".")[0] not in targets or ".bias" in name
    }
    return whole | {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in rest.items()
    }


def managed(model) -> list[str]:
    """Names of the parameters that FSDP2 gathers and reduces."""
    if not hasattr(model, "_get_fsdp_state"):
        return []
    modules = {id(module): name for name, module in model.named_modules()}
    states = (m._get_fsdp_state() for m in model.modules() if hasattr(m, "_get_fsdp_state"))
    groups = {id(g): g for state in states for g in state._fsdp_param_groups}
    infos = [p._module_info for g in groups.values() for p in g.fsdp_params]
    return sorted(f"{modules[id(info.module)]}.{info.param_name}" for info in infos)


def main(folder: str, settings: dict) -> None:
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model = tiny.llama(attention_bias=True, mlp_bias=True)
    if world > 1:
        dist.init_process_group("gloo")
        shard(model)
    config = DRTConfig(**{"schedule": "factored@0 dense@3 adapter@6 factored@9"} | settings["drt"])
    drt = DynamicRank(model, config, STEPS)
    drt.apply(0)
    optimizer = getattr(torch.optim, settings["optimizer"])(
        (p for p in model.parameters() if p.requires_grad), **settings["options"]
    )
    losses, ranks, freed, weights = [], [], [], []
    for step in range(STEPS):
        old = [weakref.ref(p) for name in drt.targets for p in trainable_weights(model.get_submodule(name))]
        if drt.begin_step(step, optimizer) is not None and step:
            gc.collect()
            now = {id(p) for p in model.parameters()}
            freed.append(all(ref() is None or id(ref()) in now for ref in old))
        total = 0.0
        for index, ids in enumerate(rows_of(step, rank, world)):
            if world > 1:
                model.set_requires_gradient_sync(index == ACCUMULATION - 1)
            loss = model(input_ids=ids, labels=ids).loss / ACCUMULATION
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if step % 3 == 2:
            weights.append(dense_weights(model, drt.targets))
            ranks.append(drt.effective_ranks())
    names = sorted(name for name, _ in model.named_parameters())
    seen = {"freed": freed, "managed": managed(model) == names if world > 1 else True, "ranks": ranks}
    gathered_losses = [None] * world
    if world > 1:
        dist.all_gather_object(gathered_losses, losses)
        losses = [sum(pair) / world for pair in zip(*gathered_losses, strict=True)]
        drt.to_dense()
        seen["plain"] = all(isinstance(p, DTensor) for p in model.parameters()) and managed(model) == sorted(
            name for name, _ in model.named_parameters()
        )
    if rank == 0:
        torch.save(weights, Path(folder, "weights.pt"))
        Path(folder, "seen.json").write_text(json.dumps(seen | {"losses": losses}))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
