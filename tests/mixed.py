"""Models in a mix of forms, such as no schedule makes: some layers dense, some factored, some adapters."""

import json
from pathlib import Path

import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_drt import Adapter, Dense, Factored, convert, declare, find_targets, form_of
from hf_drt.forms import AdapterLinear
from hf_drt.targets.surgery import Swap, replace

FORMS = (Dense(), Factored(4), Adapter(4, 8.0), Adapter(6, 16.0, "principal"))


def mixtral() -> nn.Module:
    """Two blocks, so that experts take every form, in the order in which :func:`mixed` deals them out."""
    return tiny.mixtral(num_hidden_layers=2)


MODELS = {**tiny.MODELS, "mixtral": mixtral}


def mixed(kind: str = "llama", model: nn.Module | None = None) -> nn.Module:
    """A model whose targets take the forms above in turn, each moved off its start, so that no factor is zero."""
    model = model if model is not None else MODELS[kind]()
    swaps = []
    for index, (name, module) in enumerate(find_targets(model).targets.items()):
        new = convert(module, FORMS[index % len(FORMS)]).module
        if isinstance(new, AdapterLinear):
            nn.init.normal_(new.lora_B, std=0.1)
        if new is not module:
            swaps.append(Swap(name, module, new))
    replace(model, swaps)
    declare(model)
    return model


def batch(kind: str = "llama") -> dict[str, torch.Tensor]:
    """Inputs of the model, without labels: a loss would write ``problem_type`` into its configuration."""
    inputs = tiny.batch("llama" if kind == "mixtral" else kind)
    labels = inputs.pop("labels")
    return {**inputs, "decoder_input_ids": labels} if kind == "t5" else inputs


def difference(model: nn.Module, other: nn.Module, kind: str = "llama") -> float:
    """Largest difference between the logits of two models."""
    return (tiny.logits(model, batch(kind)).float() - tiny.logits(other, batch(kind)).float()).abs().max().item()


def forms(model: nn.Module) -> dict:
    """The form of every linear layer of the blocks, by name."""
    return {name: form_of(module) for name, module in find_targets(model).targets.items()}


def files(folder: Path) -> dict[str, bytes]:
    """All that was saved."""
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def edit_block(folder: Path, change) -> None:
    """Apply ``change`` to the declaration in ``config.json``."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change) -> None:
    """Apply ``change`` to the saved tensors."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
