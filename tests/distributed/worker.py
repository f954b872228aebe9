"""One process of a run: python -m torch.distributed.run --nproc_per_node 2 worker.py FOLDER '{NAME: {SETTING: ...}}'

Trains once for each of the named settings, one after the other, and writes what the watches saw to FOLDER/NAME.
Settings are training arguments, and those that ``trained`` takes by name.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import tiny
import torch
import torch.distributed as dist
from accelerate.utils import DDPCommunicationHookType
from watches import WATCHES

import hf_drt.engines.decompose
from hf_drt import DRTTrainer, dense_state_dict


class OutOfMemory(DRTTrainer):
    """Fails once, after the backward pass of an update, in the words of CUDA's allocator."""

    at = None

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == self.at:
            self.at = None
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss


def made(
    folder: Path,
    dropout: float = 0.1,
    dtype: str = "float32",
    handler: dict | None = None,
    rebuild: bool = True,
    out_of_memory_at: int | None = None,
    gpu_fp16: bool = False,
    kind: str = "llama",
    **arguments,
) -> DRTTrainer:
    """The trainer of one cell.

    Args:
        handler: Attributes of accelerate's ``DistributedDataParallelKwargs``, beyond what training arguments reach.
        rebuild: False leaves DDP as it was before a switch, to see that a test can fail.
        kind: Of the model and the data, "llama" or "resnet".
        gpu_fp16: With ``fp16=True``, what accelerate sets up on a GPU: fp16 autocast and a gradient scaler.
    """
    model = tiny.llama(attention_dropout=dropout) if kind == "llama" else tiny.resnet()
    model = model.to(getattr(torch, dtype))
    if "RANK" in os.environ:
        arguments["ddp_backend"] = "gloo"
    cls = DRTTrainer if out_of_memory_at is None else OutOfMemory
    trainer = tiny.trainer(folder, model=model, kind=kind, cls=cls, use_cpu=True, **arguments)
    trainer.at = out_of_memory_at
    for name, value in (handler or {}).items():
        value = DDPCommunicationHookType(value) if name.startswith("comm_") and isinstance(value, str) else value
        setattr(trainer.accelerator.ddp_handler, name, value)
    if not rebuild:
        trainer._drt_around_switch = contextlib.nullcontext
    if gpu_fp16:
        trainer.accelerator.native_amp = True
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return trainer


@contextlib.contextmanager
def failing(rank: int | None):
    """On this process, no decomposition finds memory."""

    def decompose(module, form, covariance=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    kept = hf_drt.engines.decompose.decompose
    if rank is not None and rank == dist.get_rank():
        hf_drt.engines.decompose.decompose = decompose
    yield
    hf_drt.engines.decompose.decompose = kept


def errors(trainer, resume: str | None, failing_rank: int | None) -> list[str]:
    """Train; what all processes raised, if one of them is made to fail."""
    message = ""
    with failing(failing_rank):
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Exception as error:
            if failing_rank is None:
                raise
            message = f"{type(error).__name__}: {error}"
    messages = [message]
    if dist.is_initialized():
        messages = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message)
    return messages


def trained(
    folder: Path,
    watch: tuple[str, ...] = ("Bits", "Reductions"),
    resume: str | None = None,
    evaluate: bool = False,
    failing_rank: int | None = None,
    **settings,
) -> None:
    trainer = made(folder, **settings)
    watches = [WATCHES[name](trainer) for name in watch]
    for one in watches:
        trainer.add_callback(one)
    seen = {"errors": errors(trainer, resume, failing_rank)}
    seen |= {"history": trainer.state.log_history, "batch_size": trainer._train_batch_size}
    if evaluate:
        seen["loss"] = trainer.evaluate()["eval_loss"]
    for one in watches:
        seen |= one.seen
    if trainer.is_world_process_zero():
        torch.save(trainer.model.state_dict(), folder / "final.pt")
        torch.save(dense_state_dict(trainer.model), folder / "dense.pt")
        torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
        (folder / "seen.json").write_text(json.dumps(seen))


def main(folder: Path, cells: dict[str, dict]) -> None:
    torch.set_num_threads(1)
    for name, settings in cells.items():
        torch._dynamo.reset()
        trained(folder / name, **settings)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    # A thread of gloo lets go of a watch's Python hook; if the interpreter ends meanwhile, torch aborts the process.
    os._exit(0)
