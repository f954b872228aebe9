"""LinearPairsExporter: a model at low-rank size that others load, quantize and compile."""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hf_drt.checkpoint import CheckpointError, declare, runtime_names, undeclared
from hf_drt.export.dense import report_merge
from hf_drt.export.exporter import Exporter, Saving, State
from hf_drt.export.leftovers import WHOLE_MODEL_FILES
from hf_drt.export.merge import dense_state_dict, low_rank_layers, merge_errors, presented
from hf_drt.export.pairs.code import FILE_NAME, auto_classes, write_code
from hf_drt.export.pairs.modeling import LinearPair
from hf_drt.export.saving import save_export
from hf_drt.export.written import Written
from hf_drt.forms import AdapterLinear, FactoredLinear, LowRankLinear, is_projection
from hf_drt.messages import some
from hf_drt.registry import EXPORTERS
from hf_drt.targets import Swap, replace

logger = logging.getLogger(__name__)

NAME = "linear-pairs"
_OTHERS = "Use export=dense, which any class loads, or native."


class LinearPairsExporter(Exporter):
    """Each factored linear layer as two: ``V`` without a bias, then ``U`` with the layer's. All other low-rank layers
    are merged."""

    help = "factored layers as two nn.Linear each; loads with trust_remote_code, and quantizes, without 'import hf_drt'"
    loading = (
        "Each low-rank layer is two linear layers, which a file of code beside the weights puts together: pass "
        "`trust_remote_code=True`. `hf_drt` is not needed. Without it transformers stops at a size mismatch."
    )
    files = (*WHOLE_MODEL_FILES, FILE_NAME)
    by_plain_trainer = False
    sharded = False

    def code_for(self, name: str, repository: str) -> str:
        auto = next(iter(auto_classes(name)), "AutoModel")
        load = f'{auto}.from_pretrained("{repository}", trust_remote_code=True)'
        return f"from transformers import {auto}\n\nmodel = {load}"

    def check_model(self, model: nn.Module) -> None:
        cls = type(model)
        if getattr(transformers, cls.__name__, None) is not cls:
            raise ValueError(
                f"export={NAME} writes code around a model class of transformers, and {cls.__name__} (of "
                f"{cls.__module__}) is another class. {_OTHERS}"
            )
        if not auto_classes(cls.__name__):
            raise ValueError(
                f"export={NAME} loads by one of transformers' AutoModel classes, and none of them loads "
                f"{cls.__name__}. {_OTHERS}"
            )

    def instead(self, model: nn.Module) -> str | None:
        if any(True for _ in pairs(model)):
            return None
        logger.warning("export=%s, but no linear layer is factored. The model is saved in dense form.", NAME)
        return "dense"

    def write(self, saving: Saving) -> None:
        model = saving.model
        self.check_model(model)
        _report_merged(model)
        ranks = {name: layer.form.rank for name, layer in pairs(model)}
        if saving.state is not None:
            with undeclared(model), runtime_names(model):
                saving.save(str(saving.folder), self.converted(model, saving.state))
        else:
            report_merge(NAME, {name: error for name, error in merge_errors(model).items() if name not in ranks})
            with _presented(model):
                saving.save(str(saving.folder), None)
        if saving.writes:
            write_code(saving.folder, type(model), ranks)

    def converted(self, model: nn.Module, state: State) -> State:
        """As that of the model with pairs; converted once, it stays as it is."""
        rest, own = dict(state), {}
        for name, layer in pairs(model):
            if any(f"{name}.{tensor}" not in rest for tensor in layer.tensors):
                continue
            U, V = (rest.pop(f"{name}.{tensor}") for tensor in ("U", "V"))
            own |= {f"{name}.weight": V.new_empty(0, layer.in_features), f"{name}.0.weight": V, f"{name}.1.weight": U}
            if layer.bias is not None:
                own[f"{name}.1.bias"] = rest.pop(f"{name}.bias")
        report_merge(NAME, merge_errors(model, rest))
        return dense_state_dict(model, rest) | own

    def verify(self, written: Written, model: nn.Module) -> None:
        """The code is there, and both layers of each pair; those of the first are what the model computes with."""
        layers = dict(pairs(model))
        names = {f"{name}.{at}.weight": layer.get_parameter(of) for name, layer in layers.items() for at, of in _PARTS}
        lost = [FILE_NAME] if not any((folder / FILE_NAME).is_file() for folder in written.folders) else []
        lost += [name for name in names if not written.find(name)]
        if not lost:
            name, tensor = next(iter(names.items()))
            lost += [name] if not torch.equal(written.load(name), tensor.detach().cpu()) else []
        if lost:
            raise CheckpointError(
                f"{written.folder} should hold a model in linear pairs, but has not {lost[0]} of the model: the "
                "trainer writes its models in a way of its own. Use export=dense."
            )


_PARTS = ((0, "V"), (1, "U"))  # place in the pair, and name in the factored layer


def pairs(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """The layers that become pairs, under every name."""
    for name, layer in low_rank_layers(model):
        if _is_pair(layer):
            yield name, layer


def _is_pair(layer: nn.Module) -> bool:
    """Not of ``nn.MultiheadAttention``, which takes the weights of its layers and does not call them."""
    return type(layer) is FactoredLinear and set(layer.tensors) == {"U", "V"} and not is_projection(layer)


@contextlib.contextmanager
def _presented(model: nn.Module) -> Iterator[None]:
    """In the block the model is one with pairs, which hold its own factors, so that whatever saves it writes that."""
    swaps = [Swap(name, layer, _pair(layer)) for name, layer in model.named_modules() if _is_pair(layer)]
    replace(model, swaps)
    try:
        with presented(model), runtime_names(model):
            yield
    finally:
        replace(model, [Swap(swap.name, swap.new, swap.old) for swap in swaps])
        declare(model)


def _pair(layer: Any) -> LinearPair:
    with torch.device("meta"):
        pair = LinearPair(layer.in_features, layer.out_features, layer.form.rank, layer.bias is not None, layer.V)
    pair[0]._parameters["weight"], pair[1]._parameters["weight"] = layer.V, layer.U
    pair[1]._parameters["bias"] = layer.bias
    pair._buffers["weight"] = layer.V.new_empty(0, layer.in_features)
    return pair.train(layer.training)


def _report_merged(model: nn.Module) -> None:
    """Say which layers lose their small size: all that are no pairs, and have no dense base anyway."""
    names = [n for n, layer in low_rank_layers(model) if not (_is_pair(layer) or isinstance(layer, AdapterLinear))]
    if names:
        logger.warning(
            "export=%s: %s are factored, but no linear layers that are called (convolutions, experts, packed "
            "attention), and are merged: they have the size of the dense model. export=native keeps their factors.",
            NAME,
            some(names),
        )


def save_linear_pairs(model: Any, folder: str | Path, **options: Any) -> str:
    """Save a model with each factored linear layer as two ``nn.Linear``, ``y = U (V x) + b``, for use without hf_drt.

    ``from_pretrained(folder, trust_remote_code=True)`` loads it, by an ``AutoModel`` class: a file of code beside the
    weights replaces the layers that ``config.json`` names. What looks for ``nn.Linear``, such as ``quantize_`` of
    torchao, finds them; logits are those of the native model. Adapters are merged; so are factored convolutions,
    experts and packed attention, which the log names. The model itself stays as it is.

    Args:
        model: One of transformers', in any mix of forms.
        folder: Where to.
        options: Of ``save_pretrained``, such as ``max_shard_size``.

    Returns:
        What was written: 'linear-pairs', or 'dense' where no linear layer is factored.

    Raises:
        ValueError: The model's class is not one of transformers', or no ``AutoModel`` class loads it.
    """

    def save(where: str, state: State | None) -> None:
        model.save_pretrained(where, state_dict=state, **options)

    return save_export(model, str(folder), NAME, save)


EXPORTERS.add(NAME, LinearPairsExporter())
