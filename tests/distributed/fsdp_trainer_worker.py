"""DRTTrainer under FSDP2, or alone: fsdp_trainer_worker.py FOLDER JSON.

Beside settings of the run the JSON has ``kind`` (of the state dict; without it the run is alone), ``model``, ``dtype``,
``replicas`` (of HSDP), ``policy`` (dtypes of weights and of gradients as they are reduced), ``padded`` (labels),
``mean`` (the loss is one over the labels of a batch alone),
``resume`` (steps of whose checkpoints a second run goes on), ``others`` (checkpoints of other runs from which one does)
and ``other`` (one that is refused).
"""

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
from accelerate.parallelism_config import ParallelismConfig
from datasets import Dataset
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from hf_drt import CheckpointError, dense_state_dict

MODELS = {
    "llama": (lambda: tiny.llama(attention_bias=True, mlp_bias=True), "LlamaDecoderLayer"),
    "mixtral": (lambda: tiny.mixtral(num_hidden_layers=2), "MixtralDecoderLayer"),
}


def trainer(folder: Path, world: int, kind: str | None, *, model="llama", dtype="float32", **settings):
    make, block = MODELS[model]
    names = ("replicas", "policy", "padded", "mean")
    replicas, policy, padded, mean = (settings.pop(name, None) for name in names)
    if kind is not None:
        units = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": [block]}
        units |= {"state_dict_type": kind, **settings.pop("fsdp_config", {})}
        settings |= {"fsdp": True, "fsdp_config": units}
    if replicas is not None:
        settings["parallelism_config"] = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=world // replicas)
    common = {
        "use_cpu": True, "per_device_train_batch_size": 8 // world, "adam_epsilon": 1e-5, "save_strategy": "steps",
        "save_steps": 1, "max_steps": 12, "logging_steps": 1, "drt_schedule": "factored@0 dense@3 adapter@6 factored@9",
    }  # fmt: skip
    net = make().to(getattr(torch, dtype))
    if mean:
        net.accepts_loss_kwargs = False
    run = tiny.trainer(folder, net, **common | settings)
    if padded:
        run.train_dataset = with_padding()
    if policy is not None:
        weights, reduced = (getattr(torch, name) for name in policy)
        own = MixedPrecisionPolicy(param_dtype=weights, reduce_dtype=reduced)
        run.accelerator.state.fsdp_plugin.mixed_precision_policy = own
    return run


def with_padding(rows: int = 64) -> Dataset:
    """Sequences of which other shares are labelled, some not at all."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, tiny.VOCAB, (rows, tiny.LENGTH), generator=generator)
    labels = ids.clone()
    for row, length in enumerate(torch.randint(0, tiny.LENGTH, (rows,), generator=generator).tolist()):
        labels[row, length:] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def whole(model) -> dict[str, torch.Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in model.named_parameters()}


def dense(run) -> dict[str, torch.Tensor]:
    """What the layers compute with, on the first process. Factors of a run of its own may have other signs, since they
    come from an SVD of weights that differ by rounding."""
    return dense_state_dict(run.model, run.accelerator.get_state_dict(run.model))


def gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(((one[name] - other[name]).abs().max().item() for name in one), default=0.0)


def losses(run) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def refusal(make, folder: str) -> str:
    try:
        make().train(resume_from_checkpoint=folder)
    except CheckpointError as error:
        return str(error)
    return ""


def main(folder: Path, settings: dict) -> None:
    torch.set_num_threads(1)
    kind, resume, others = settings.pop("kind", None), settings.pop("resume", []), settings.pop("others", {})
    other = settings.pop("other", None)
    if kind is not None:
        cpu_fsdp.allow()
    world = int(os.environ.get("WORLD_SIZE", 1))
    run, passes = trainer(folder, world, kind, **settings), []
    run.model.register_forward_pre_hook(lambda module, inputs: passes.append(module.training))
    run.train()
    run.save_model(str(folder / "final"))
    end, weights = whole(run.model), dense(run) if others else {}
    local = [p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in run.model.parameters()]
    seen = {
        "history": run.state.log_history, "sharded": all(isinstance(p, DTensor) for p in run.model.parameters()),
        "local": sum(local), "empty": local.count(0), "total": sum(p.numel() for p in end.values()), "gaps": {},
        "others": {}, "passes": sum(passes),
    }  # fmt: skip
    for step in resume:
        again = trainer(folder, world, kind, **settings)
        again.train(resume_from_checkpoint=True if step == "last" else str(folder / f"checkpoint-{step}"))
        seen["gaps"][step] = gap(end, whole(again.model))
    for name, path in others.items():
        again = trainer(folder / name, world, kind, **settings | {"save_strategy": "no"})
        again.train(resume_from_checkpoint=path)
        seen["others"][name] = {"gap": gap(weights, dense(again)), "losses": losses(again)}
    seen["refusal"] = "" if other is None else refusal(lambda: trainer(folder, world, kind, **settings), other)
    counts = [None] * world
    if world > 1:
        dist.all_gather_object(counts, seen["empty"])
        seen["empty"] = counts
    if run.is_world_process_zero():
        (folder / "seen.json").write_text(json.dumps(seen))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
