"""Runs that an older hf_drt makes in a process of its own and today's repeats, written with what both have.

``python older_runs.py FOLDER`` makes them all and leaves checkpoints, exports and outcomes there.
"""

import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import nn

import hf_drt
from hf_drt import DRTTrainer

CHECKPOINTS = (5, 10, 15)  # in the first factored, the dense and the adapter phase of the default schedule

# Name -> kind of model, and what differs from tiny.arguments.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {}),
    "rules": (
        "llama",
        {
            "drt_factored_lr_scale": 2.0, "drt_frobenius_decay": True, "weight_decay": 0.1, "drt_rewarmup_steps": 3,
            "drt_moments": "project",
        },
    ),
    "principal": ("llama", {"drt_adapter_init": "principal", "optim": "sgd", "optim_args": "momentum=0.9"}),
    "windows": (
        "llama",
        {"drt_schedule": "adaptive(signal=loss,plateau=90,window=15,every=10)", "drt_budget": 0.8, "drt_rank": 4},
    ),
    "auto": ("llama", {"drt_schedule": "auto", "drt_budget": 0.75}),
    "convolutions": ("resnet", {"drt_decomposition": "tucker"}),
    "experts": ("mixtral", {}),
}  # fmt: skip
MODELS = {"llama": tiny.llama, "resnet": tiny.resnet, "mixtral": tiny.mixtral}
PEFT = {"drt_schedule": "factored@0 dense@30% adapter@60%", "drt_export": "adapter"}


def trainer(name: str, folder: Path, **changes: Any) -> DRTTrainer:
    """Trainer of one of :data:`RUNS`, whose model stays in the form of the last phase."""
    kind, settings = RUNS[name]
    settings = {"drt_export": "native", "save_strategy": "steps", "save_steps": 5, **settings, **changes}
    return tiny.trainer(folder, MODELS[kind](), kind, **settings)


def trained_on(model: nn.Module, folder: Path) -> DRTTrainer:
    """A saved model that has been trained on, through another change of form."""
    settings = {"max_steps": 6, "drt_schedule": "adapter@0 dense@50%", "drt_rank": 4}
    run = tiny.trainer(folder, model, **settings)
    run.train()
    return run


def outcome(run: DRTTrainer, kind: str = "llama") -> dict[str, Any]:
    """Weights, state of the optimizer, phases and logits, as :func:`torch.save` takes them."""
    return {
        "weights": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "plan": str(run.drt.plan),
        "logits": tiny.logits(run.model, tiny.batch(kind)),
    }


def main(folder: Path) -> None:
    from hf_drt.hub.peft import load_peft_adapter
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    print(hf_drt.__file__)
    for name, (kind, _) in RUNS.items():
        run = trainer(name, folder / name)
        run.train()
        run.save_model(str(folder / name / "native"))
        torch.save(outcome(run, kind), folder / name / "outcome.pt")
    native = LlamaForCausalLM.from_pretrained(folder / "linear" / "native")
    torch.save(outcome(trained_on(native, folder / "native_on")), folder / "native_on.pt")
    run = trainer("linear", folder / "peft", **PEFT)
    run.train()
    run.save_model(str(folder / "peft" / "export"))
    torch.save(outcome(run), folder / "peft" / "outcome.pt")
    base = LlamaForCausalLM.from_pretrained(folder / "peft" / "export" / "base")
    load_peft_adapter(base, folder / "peft" / "export")
    torch.save(outcome(trained_on(base, folder / "peft_on")), folder / "peft_on.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
