"""What one process sends in the update steps of every phase: bytes_worker.py FOLDER JSON; see test_counted_bytes.py.

Bytes are counted twice: as the tensors that go into collectives, by DDP's communication hook or around the functions of
torch.distributed that FSDP2 calls; and as what the process has written to its sockets, by the kernel's own counter.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import cpu_fsdp
import cpu_zero
import tiny
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_drt import DRTConfig, DynamicRank

# Functions that FSDP2 calls, and DeepSpeed: the kind, and which argument is the whole tensor.
CALLS = {
    "all_gather_single": ("all_gather", 0, "output_tensor"),
    "reduce_scatter_single": ("reduce_scatter", 1, "input"),
    "all_gather_into_tensor": ("all_gather", 0, "output_tensor"),
    "reduce_scatter_tensor": ("reduce_scatter", 1, "input"),
    "all_reduce": ("all_reduce", 0, "tensor"),
}

# Small weights too are in parts, and none stays gathered: the model is far below DeepSpeed's limits for either.
ZERO = {3: {"stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}


class Counter:
    """Bytes of whole tensors by kind of collective, and those written to sockets."""

    def __init__(self):
        self.sizes, self.rows = {}, []
        for name, (kind, position, keyword) in CALLS.items():
            setattr(dist, name, self._counting(getattr(dist, name), kind, position, keyword))

    def _counting(self, function, kind, position, keyword):
        def counted(*args, **kwargs):
            self.add(kind, args[position] if len(args) > position else kwargs[keyword])
            return function(*args, **kwargs)

        return counted

    def add(self, kind, tensor):
        self.sizes[kind] = self.sizes.get(kind, 0) + tensor.numel() * tensor.element_size()

    def hook(self, state, bucket):
        """What DDP gives to be averaged; the default hook's own call is not counted again."""
        before = dict(self.sizes)
        future = default_hooks.allreduce_hook(None, bucket)
        self.sizes = before
        self.add("all_reduce", bucket.buffer())
        return future

    def begin(self):
        dist.barrier()
        self.sizes, self.written = {}, written()

    def end(self, held):
        self.rows.append({"sizes": dict(self.sizes), "written": written() - self.written, **held})


def written() -> int:
    """Bytes that this process has written, to files and sockets."""
    return int(Path("/proc/self/io").read_text().split("wchar: ")[1].split()[0])


def held(model, optimizer) -> dict[str, int]:
    """Bytes of this process's parameters, gradients and optimizer state."""

    def size(tensors):
        local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return sum(t.numel() * t.element_size() for t in local)

    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return {"weights": size(model.parameters()), "gradients": size(grads), "optimizer": size(states)}


class Watch(TrainerCallback):
    """Counts from the begin of an update step, after a switch, to the optimizer's step."""

    def __init__(self, trainer, counter):
        self.trainer, self.counter = trainer, counter

    def on_train_begin(self, *args, **kwargs):
        wrapped = self.trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel):
            wrapped.register_comm_hook(None, self.counter.hook)

    def on_step_begin(self, *args, **kwargs):
        self.counter.begin()

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.counter.end({})

    def on_optimizer_step(self, *args, **kwargs):
        optimizer = self.trainer.optimizer
        self.counter.rows[-1] |= held(self.trainer.model, getattr(optimizer, "optimizer", optimizer))


def by_trainer(folder: Path, engine: str, model, counter: Counter, drt: dict, **settings) -> None:
    if engine == "fsdp2":
        cpu_fsdp.allow()
        units = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}
        settings |= {"fsdp": True, "fsdp_config": units}
    elif engine.startswith("zero"):
        stage = int(engine.removeprefix("zero"))
        settings["deepspeed"] = cpu_zero.deepspeed(stage, **ZERO.get(stage, {}))
    else:
        settings |= {"ddp_backend": "gloo"}
    trainer = tiny.trainer(
        folder, model, use_cpu=True, save_strategy="no", per_device_train_batch_size=1, logging_steps=1000,
        **{f"drt_{name}": value for name, value in drt.items()}, **settings,
    )  # fmt: skip
    trainer.add_callback(Watch(trainer, counter))
    trainer.train()


def by_hand(shards: int, model, counter: Counter, drt: dict, max_steps: int, gradient_accumulation_steps: int) -> None:
    """HSDP, which Accelerate does not make on a CPU, in the units that it makes of FSDP2."""
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // shards, shards), mesh_dim_names=("replica", "shard"))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model.model.embed_tokens, mesh=mesh, reshard_after_forward=True)
    fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    controller = DynamicRank(model, DRTConfig(**drt), max_steps)
    controller.apply(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.arange(tiny.LENGTH)[None]
    for step in range(max_steps):
        controller.begin_step(step, optimizer)
        counter.begin()
        for index in range(gradient_accumulation_steps):
            model.set_requires_gradient_sync(index == gradient_accumulation_steps - 1)
            model(input_ids=ids, labels=ids).loss.backward()
        counter.end({})
        optimizer.step()
        counter.rows[-1] |= held(model, optimizer)
        optimizer.zero_grad()


def main(folder: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    engine, shards = settings.pop("engine"), settings.pop("shards", None)
    model, counter = tiny.llama(**settings.pop("model")), Counter()
    if engine == "hsdp":
        by_hand(shards, model, counter, **settings)
    else:
        by_trainer(folder, engine, model, counter, **settings)
    rows = [None] * dist.get_world_size()
    dist.all_gather_object(rows, counter.rows)
    if dist.get_rank() == 0:
        (folder / "seen.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a thread of gloo lets go of the hook; see worker.py
