"""One process of a launch that Accelerate may or may not join: lone_worker.py FOLDER JSON

JSON: ``kind`` of what is made: "mixin", "subclass", "callback", "run", "loop" or "off"; other training arguments, or
for a loop whether there is a ``group``. Writes what happened to FOLDER/seen_RANK.json.
"""

import contextlib
import json
import logging
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import tiny
import torch
import torch.distributed as dist
import transformers

from hf_drt import DRTCallback, DRTConfig, DRTTrainerMixin, DynamicRank, run

SCHEDULE = "factored@0 dense@50%"


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def main(folder: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    kind, records = settings.pop("kind"), Records()
    logging.getLogger("hf_drt").addHandler(records)
    own = SCHEDULE if kind in ("mixin", "subclass") else None
    common = {"max_steps": 4, "drt_schedule": own, **settings}
    seen, place = {}, folder / os.environ.get("RANK", "0")
    try:
        if kind == "loop":
            loop(**settings)
        else:
            config = DRTConfig(schedule=SCHEDULE, rank_multiple=4)
            with run.dynamic_rank_trainers(config) if kind == "run" else contextlib.nullcontext():
                trainer = tiny.trainer(place, cls=made(kind), **common)
            trainer.train()
            seen["steps"] = trainer.state.global_step
    except ValueError as error:
        seen["error"] = str(error)
    seen["messages"] = records.messages
    (folder / f"seen_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.destroy_process_group()


def made(kind: str):
    match kind:
        case "mixin":
            return tiny.DRTTrainer
        case "subclass":
            return type("Mine", (DRTTrainerMixin, transformers.Trainer), {})
        case "run":
            return transformers.Trainer  # which is another in the block
    callbacks = [DRTCallback(SCHEDULE)] if kind == "callback" else []
    return lambda **arguments: transformers.Trainer(**arguments, callbacks=callbacks)


def loop(group: bool = False) -> None:
    if group:
        dist.init_process_group("gloo")
    drt = DynamicRank(tiny.llama(), DRTConfig(schedule="factored@0", rank_multiple=4), max_steps=3)
    for step in range(3):
        drt.begin_step(step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
