"""One process of a run that goes on from its last checkpoint, under any engine: elastic_worker.py FOLDER JSON

JSON: ``engine``, a name in :data:`ENGINES`; ``until``, the step after whose save all processes end; ``dies``,
``{"process": i, "step": s}`` of a process that kills itself, the first time that a job is started; other training
arguments. Each event appends a line of JSON to FOLDER/log; a run that has ended leaves its weights in FOLDER/final.pt.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import cpu_fsdp
import cpu_zero
import tiny
import torch
import torch.distributed as dist
from transformers import TrainerCallback

_FSDP = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}
# What has to be done in a process before its trainer is made, and the training arguments.
ENGINES = {
    "ddp": (lambda: None, {}),
    "fsdp2": (cpu_fsdp.allow, {"fsdp": True, "fsdp_config": _FSDP | {"state_dict_type": "SHARDED_STATE_DICT"}}),
    "fsdp2_full": (cpu_fsdp.allow, {"fsdp": True, "fsdp_config": _FSDP | {"state_dict_type": "FULL_STATE_DICT"}}),
    "zero2": (lambda: None, {"deepspeed": cpu_zero.deepspeed(2)}),
}
# 16 rows an update on two processes, four updates an epoch; phases end within epochs and at their ends. With momentum,
# since torch 2.13 cannot load the FULL_STATE_DICT of an optimizer without any tensor.
RUN = {
    "use_cpu": True, "ddp_backend": "gloo", "optim": "sgd", "optim_args": "momentum=0.5", "learning_rate": 0.1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2, "max_steps": 12, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1,
    "drt_schedule": "factored@0 dense@4 adapter@9",
}  # fmt: skip


def told(folder: Path) -> list[dict]:
    """The events so far; the last line may be cut short by a kill."""
    path = folder / "log"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


class Tells(logging.Handler):
    """What the first process of a run says to FOLDER/log."""

    def __init__(self, folder: Path):
        super().__init__(logging.WARNING)
        self.folder = folder

    def tell(self, **event) -> None:
        if os.environ.get("RANK", "0") == "0":
            with (self.folder / "log").open("a") as file:
                file.write(json.dumps(event) + "\n")

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(warning=record.getMessage())


class Events(TrainerCallback):
    def __init__(self, tells: Tells, until: int | None, dies: dict | None):
        self.tells, self.until, self.dies = tells, until, dies

    def on_train_begin(self, args, state, control, **kwargs):
        self.tells.tell(begins=state.global_step, processes=args.world_size, rows=rows(args))

    def on_substep_end(self, args, state, control, **kwargs):
        self._die(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        self.tells.tell(step=state.global_step)
        self._die(state.global_step)

    def on_save(self, args, state, control, **kwargs):
        self.tells.tell(saved=state.global_step)
        if state.global_step == self.until:
            if dist.is_initialized():
                dist.barrier()
            os._exit(0)

    def _die(self, step: int) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.dies is not None and first and (dist.get_rank(), step) == (self.dies["process"], self.dies["step"]):
            os.kill(os.getpid(), signal.SIGKILL)


def rows(args) -> list[int]:
    return [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size]


def main(folder: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    engine, until, dies = settings.pop("engine"), settings.pop("until", None), settings.pop("dies", None)
    dropout = settings.pop("dropout", 0.0)
    prepare, arguments = ENGINES[engine]
    prepare()
    tells = Tells(folder)
    logging.getLogger("hf_drt").addHandler(tells)
    trainer = tiny.trainer(folder, tiny.llama(attention_dropout=dropout), **RUN | arguments | settings)
    trainer.add_callback(Events(tells, until, dies))
    trainer.train(resume_from_checkpoint="auto")
    final = cpu_zero.whole(trainer.model)
    if trainer.is_world_process_zero():
        torch.save(final, folder / "final.pt")
        (folder / "losses.json").write_text(json.dumps([r["loss"] for r in trainer.state.log_history if "loss" in r]))
        tells.tell(ended=trainer.state.global_step)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
