"""One process of a launch that Accelerate may or may not join: lone_worker.py FOLDER JSON

JSON: ``kind`` of what is made: "mixin", "callback" or "off"; other training arguments. Writes what happened to
FOLDER/seen_RANK.json.
"""

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
from transformers import Trainer

from hf_drt import DRTCallback


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
    common = {"max_steps": 4, "drt_schedule": None if kind != "mixin" else "factored@0 dense@50%", **settings}
    seen = {}
    try:
        trainer = tiny.trainer(folder / os.environ.get("RANK", "0"), cls=made(kind), **common)
        trainer.train()
        seen["steps"] = trainer.state.global_step
    except ValueError as error:
        seen["error"] = str(error)
    seen["messages"] = records.messages
    (folder / f"seen_{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.destroy_process_group()


def made(kind: str):
    if kind == "mixin":
        return tiny.DRTTrainer
    callbacks = [DRTCallback("factored@0 dense@50%")] if kind == "callback" else []
    return lambda **arguments: Trainer(**arguments, callbacks=callbacks)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
