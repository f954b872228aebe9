"""One process under ZeRO-3 that counts the whole layers of a switch: zero_peak_worker.py FOLDER JSON."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import tiny
import torch
from cpu_zero import deepspeed

from hf_drt.simulate.counter import StepCounter
from hf_drt.trainer.driver import PhaseDriver

LAYER = 96 * 160 * 4  # bytes of the largest layer, which nothing else has


class WholeLayers(StepCounter):
    """Of tensors that are as large as a whole layer's weight."""

    def add(self, tensor):
        if not tensor.is_meta and tensor.untyped_storage().nbytes() == LAYER:
            super().add(tensor)


def main(folder: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    rows: list[dict] = []
    begins = PhaseDriver.step_begins

    def counted(self, args, state, optimizer):
        if not self.controller.match(state.global_step):
            return begins(self, args, state, optimizer)
        with WholeLayers() as counter:
            begins(self, args, state, optimizer)
        rows.append({"wholes": counter.peak / LAYER, "left": counter.now / LAYER})

    PhaseDriver.step_begins = counted
    model = tiny.llama(hidden_size=96, intermediate_size=160, num_hidden_layers=settings["blocks"])
    config = deepspeed(3, reduce_bucket_size=500, stage3_prefetch_bucket_size=500)
    run = tiny.trainer(
        folder, model, use_cpu=True, per_device_train_batch_size=4, max_steps=5, save_strategy="no", deepspeed=config,
        drt_schedule="factored@0 dense@1 adapter@2 factored@3 dense@4", drt_moments=settings["moments"], drt_rank=8,
    )  # fmt: skip
    run.train()
    if int(os.environ["RANK"]) == 0:
        (folder / "seen.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
