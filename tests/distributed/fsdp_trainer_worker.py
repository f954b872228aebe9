"""DRTTrainer under FSDP2, or alone: fsdp_trainer_worker.py FOLDER JSON; see test_fsdp_trainer.py."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import cpu_fsdp
import tiny
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hf_drt import CheckpointError

UNITS = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
}


def trainer(folder: Path, world: int, dtype: str, kind: str | None, **settings):
    model = tiny.llama(attention_bias=True, mlp_bias=True).to(getattr(torch, dtype))
    if kind is not None:
        settings |= {"fsdp": True, "fsdp_config": UNITS | {"state_dict_type": kind, **settings.pop("fsdp_config", {})}}
    common = {
        "use_cpu": True, "per_device_train_batch_size": 8 // world, "adam_epsilon": 1e-5, "save_strategy": "steps",
        "save_steps": 1, "max_steps": 12, "logging_steps": 1, "drt_schedule": "factored@0 dense@3 adapter@6 factored@9",
    }  # fmt: skip
    return tiny.trainer(folder, model, **common | settings)


def whole(model) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def main(folder: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    kind, resume, dtype = settings.pop("kind", None), settings.pop("resume", []), settings.pop("dtype", "float32")
    other = settings.pop("other", None)
    if kind is not None:
        cpu_fsdp.allow()
    run = trainer(folder, world, dtype, kind, **settings)
    run.train()
    run.save_model(str(folder / "final"))
    end, history = whole(run.model), run.state.log_history
    sharded = all(isinstance(p, DTensor) for p in run.model.parameters())
    gaps = {}
    for step in resume:
        again = trainer(folder, world, dtype, kind, **settings)
        again.train(resume_from_checkpoint=True if step == "last" else str(folder / f"checkpoint-{step}"))
        new = whole(again.model)
        gaps[step] = max((end[name] - new[name]).abs().max().item() for name in end)
    refusal = ""
    if other is not None:
        try:
            trainer(folder, world, dtype, kind, **settings).train(resume_from_checkpoint=other)
        except CheckpointError as error:
            refusal = str(error)
    if run.is_world_process_zero():
        seen = {"history": history, "sharded": sharded, "gaps": gaps, "refusal": refusal}
        (folder / "seen.json").write_text(json.dumps(seen))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
