"""What a run on several processes is watched for: callbacks of worker.py, each with a JSON-serialisable ``seen``."""

import hashlib
import weakref

import torch
import torch._dynamo
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from hf_drt.forms import trainable_weights
from hf_drt.optim import unwrap


def digest(model) -> str:
    """Of the parameters: DDP evens out the buffers of batch norms in the next forward pass only."""
    sha = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        sha.update(name.encode() + p.detach().float().numpy().tobytes())
    return sha.hexdigest()


class Watch(TrainerCallback):
    """Comes after the trainer's own callback: in ``on_step_begin`` the switch is made."""

    seen: dict

    def __init__(self, trainer):
        self.trainer = trainer
        self.seen = {}

    @property
    def ddp(self) -> DistributedDataParallel | None:
        wrapped = getattr(self.trainer.model_wrapped, "_orig_mod", self.trainer.model_wrapped)
        return wrapped if isinstance(wrapped, DistributedDataParallel) else None


class Bits(Watch):
    """Whether all processes hold the same bits after every step, and how many DDP objects there were."""

    def on_step_end(self, args, state, control, **kwargs):
        if dist.is_initialized():
            digests = [None] * dist.get_world_size()
            dist.all_gather_object(digests, digest(self.trainer.model))
            self.seen.setdefault("equal", []).append(len(set(digests)) == 1)
        self.ids = {*getattr(self, "ids", ()), id(self.trainer.model_wrapped)}
        self.seen["ddp_objects"] = len(self.ids)


class Reductions(Watch):
    """Reductions of buckets per update."""

    count = 0

    def hook(self, state, bucket):
        self.count += 1
        return default_hooks.allreduce_hook(None, bucket)

    def on_train_begin(self, args, state, control, **kwargs):
        if self.ddp is not None:
            self.ddp.register_comm_hook(None, self.hook)

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.setdefault("reductions", []).append(self.count)
        self.count = 0


class Options(Watch):
    """What the reducer itself says of its settings, at the end of each phase."""

    def on_step_end(self, args, state, control, **kwargs):
        logged = self.ddp._get_ddp_logging_data()
        names = (
            "find_unused_parameters", "bucket_cap_bytes", "broadcast_buffers", "gradient_as_bucket_view",
            "static_graph", "num_parameter_tensors", "num_buckets_reduced", "comm_hook",
        )  # fmt: skip
        options = {name: logged.get(name, 0) for name in names}
        self.seen.setdefault("options", {})[str(self.trainer.drt.phase)] = options


class Hooks(Watch):
    """The communication hook after every step, and what it does to the gradients of one layer."""

    given = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not self.ddp._comm_hooks:
            self.ddp.register_comm_hook(*self.own())
        self.given = list(self.ddp._comm_hooks)

    def own(self):
        return None, default_hooks.fp16_compress_hook

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        layer = self.trainer.model.get_submodule(next(iter(self.trainer.drt.targets)))
        grads = [p.grad for p in trainable_weights(layer)]
        row = {
            "kept": [(hook, id(of)) for hook, of in self.ddp._comm_hooks]
            == [(hook, id(of)) for hook, of in self.given],
            "fp16": all(torch.equal(grad, grad.half().float()) for grad in grads),
            "rank": max(torch.linalg.matrix_rank(grad).item() for grad in grads),
        }
        self.seen.setdefault("hooks", []).append(row)


class PowerSGD(Hooks):
    def own(self):
        return PowerSGDState(None, start_powerSGD_iter=2), powerSGD_hook


class Lifetimes(Watch):
    """What is still alive, directly after a switch, of what only the phase before had: how many of how many."""

    phase = None

    def hook(self, state, bucket):
        self.buckets.append(StorageWeakRef(bucket.buffer().untyped_storage()))
        return default_hooks.allreduce_hook(None, bucket)

    def on_train_begin(self, args, state, control, **kwargs):
        self.buckets = []
        self.ddp.register_comm_hook(None, self.hook)

    def layers(self) -> list[torch.nn.Module]:
        return [self.trainer.model.get_submodule(name) for name in self.trainer.drt.targets]

    def on_step_begin(self, args, state, control, **kwargs):
        if self.phase is not None and self.phase != self.trainer.drt.phase:
            taken_over = set(_storages(p for layer in self.layers() for p in layer.parameters()))
            row = {"reducer": self.reducer() is not None}
            for name, storages in self.before.items():
                row[name] = sum(not one.expired() for one in storages if one not in taken_over), len(storages)
            self.seen.setdefault("alive", []).append(row)
        self.phase = self.trainer.drt.phase

    def on_step_end(self, args, state, control, **kwargs):
        weights = [p for layer in self.layers() for p in layer.parameters()]
        of_weights = unwrap(self.trainer.optimizer).state
        self.before = {
            "weights": _storages(weights),
            "moments": _storages(v for p in weights for v in of_weights.get(p, {}).values()),
            "buckets": self.buckets,
        }
        self.reducer = weakref.ref(self.ddp.reducer)
        self.buckets = []


def _storages(tensors) -> list[StorageWeakRef]:
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]


class Compilations(Watch):
    """Graphs that dynamo has captured and compiled, in all, at the end of each phase."""

    def on_train_begin(self, args, state, control, **kwargs):
        torch._dynamo.utils.counters.clear()

    def on_step_end(self, args, state, control, **kwargs):
        counters = torch._dynamo.utils.counters
        graphs = counters["stats"]["unique_graphs"], counters["aot_autograd"]["ok"]
        self.seen.setdefault("graphs", {})[str(self.trainer.drt.phase)] = graphs


WATCHES = {watch.__name__: watch for watch in (Bits, Reductions, Options, Hooks, PowerSGD, Lifetimes, Compilations)}
