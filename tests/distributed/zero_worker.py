"""DRTTrainer under DeepSpeed, or alone: zero_worker.py FOLDER JSON; see test_zero.py."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import conftest  # noqa: F401
import tiny
import torch
import torch.distributed as dist
import transformers as T
from cpu_zero import deepspeed, whole

from hf_drt import CheckpointError


def trainer(folder: Path, world: int, stage: int | None, zero: dict, pretrained: bool = False, **settings):
    if stage is not None:
        settings["deepspeed"] = deepspeed(stage, **zero)
    model = tiny.llama(attention_bias=True, mlp_bias=True)
    if pretrained:  # the arguments come first: with them from_pretrained() partitions the model
        path = folder / f"model-{os.environ.get('RANK', 0)}"
        model.save_pretrained(path)
        kept = tiny.arguments(folder / "arguments", use_cpu=True, deepspeed=settings["deepspeed"])  # noqa: F841
        model = T.AutoModelForCausalLM.from_pretrained(path)
        assert not any(p.numel() for p in model.parameters()), "ZeRO-3 has not partitioned it"
    common = {
        "use_cpu": True, "per_device_train_batch_size": 8 // world, "adam_epsilon": 1e-5, "save_strategy": "steps",
        "save_steps": 1, "max_steps": 12, "logging_steps": 1, "drt_schedule": "factored@0 dense@3 adapter@6 factored@9",
    }  # fmt: skip
    return tiny.trainer(folder, model, **common | settings)


def missing_parts(run) -> list[str]:
    """What the engine relies on of DeepSpeed's private parts, and this version has not."""
    if not run.is_deepspeed_enabled:
        return []
    from hf_drt.engines.zero.layout import SEAMS, stage_of

    zero = run.optimizer.optimizer.zero
    return [name for name in SEAMS[stage_of(zero)] if not hasattr(zero, name)]


def main(folder: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", 1))
    stage, zero, resume = settings.pop("stage", None), settings.pop("zero", {}), settings.pop("resume", [])
    other, others, twice = settings.pop("other", None), settings.pop("others", []), settings.pop("twice", False)
    run = trainer(folder, world, stage, zero, **settings)
    run.train()
    run.save_model(str(folder / "final"))
    end, history = whole(run.model), run.state.log_history
    gaps: dict = {}
    for step in resume:
        again = trainer(folder, world, stage, zero, **settings)
        again.train(resume_from_checkpoint=True if step == "last" else str(folder / f"checkpoint-{step}"))
        new = whole(again.model)
        gaps[step] = max((end[name].float() - new[name].float()).abs().max().item() for name in end)
    by_others = []
    for path in others:
        again = trainer(folder, world, stage, zero, **settings)
        again.train(resume_from_checkpoint=path)
        by_others.append([row["loss"] for row in again.state.log_history if "loss" in row])
    refusal = ""
    if other is not None:
        try:
            trainer(folder, world, stage, zero, **settings).train(resume_from_checkpoint=other)
        except CheckpointError as error:
            refusal = str(error)
    if twice:
        try:
            run.train()
        except ValueError as error:
            refusal = str(error)
    equal = True
    if dist.is_initialized():
        everywhere: list = [None] * world
        dist.all_gather_object(everywhere, {name: value.double().sum().item() for name, value in end.items()})
        equal = all(one == everywhere[0] for one in everywhere)
    if int(os.environ.get("RANK", 0)) == 0:
        seen = {
            "missing": missing_parts(run),
            "history": history,
            "gaps": gaps,
            "others": by_others,
            "refusal": refusal,
            "equal": equal,
        }
        (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
