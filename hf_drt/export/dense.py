"""DenseExporter: an ordinary model, that loads anywhere."""

import logging

import torch
from torch import nn

from hf_drt.checkpoint import CheckpointError, undeclared
from hf_drt.engines import engine_of
from hf_drt.export.exporter import Exporter, Saving, State
from hf_drt.export.merge import dense_state_dict, dense_weight, low_rank_layers, merge_errors, presented
from hf_drt.export.written import Written
from hf_drt.registry import EXPORTERS

logger = logging.getLogger(__name__)


class DenseExporter(Exporter):
    """Every low-rank layer merged: W = U V, or base + s B A."""

    help = "an ordinary model, loads anywhere; the model itself is one too, once training is over"
    loading = "The weights are an ordinary dense model, which loads anywhere, without `hf_drt`."
    in_place = True
    declared = False

    def write(self, saving: Saving) -> None:
        if saving.state is not None:
            with undeclared(saving.model):
                saving.save(str(saving.folder), self.converted(saving.model, saving.state))
        else:
            report_merge("dense", merge_errors(saving.model))
            with presented(saving.model):
                saving.save(str(saving.folder), None)

    def converted(self, model: nn.Module, state: State) -> State:
        """As that of the dense model, with what rounding costs in the log."""
        report_merge("dense", merge_errors(model, state))
        return dense_state_dict(model, state)

    def verify(self, written: Written, model: nn.Module) -> None:
        """No low-rank tensor is there, and the one layer that is read back has the effective W of the model's."""
        check_no_factors(written, model)
        name, layer = next(low_rank_layers(model))
        found = written.find(layer.dense_key(name))
        if found is None or engine_of(model).sharded:  # under a published name, or in a file of many layers
            return
        stored, expected = written.load(found), dense_weight(layer).cpu()
        if stored.dtype == expected.dtype and not torch.equal(stored, expected):
            raise CheckpointError(
                f"{found} in {written.folder} is not what the model computes with: the trainer has written other "
                "weights than those of its model. Call trainer.drt.to_dense(), and save the model by "
                "model.save_pretrained()."
            )


def check_no_factors(written: Written, model: nn.Module) -> None:
    """Whether no tensor of a low-rank form has landed.

    Raises:
        CheckpointError: One has.
    """
    for name, layer in low_rank_layers(model):
        for tensor in layer.tensors:
            if found := written.find(f"{name}.{tensor}"):
                raise CheckpointError(
                    f"{written.folder} should hold a dense model, but has {found}: the trainer has written low-rank "
                    "tensors. Call trainer.drt.to_dense() before saving, or use export=native."
                )


def report_merge(export: str, errors: dict[str, float]) -> None:
    """Log the largest of :func:`merge_errors`, as a warning where it is above 0.1."""
    if not errors:
        return
    name, worst = max(errors.items(), key=lambda entry: entry[1])
    if worst > 0.1:
        logger.warning(
            "%s export: rounding to the weights' dtype loses %.0f %% of what the factors of %s hold, the most of %d "
            "layers. Convert the model to float32 and save it again, or use export=native or adapter.",
            export,
            100 * worst,
            name,
            len(errors),
        )
    else:
        logger.info("%s export: rounding error of the merge at most %.2g (%d layers)", export, worst, len(errors))


EXPORTERS.add("dense", DenseExporter())
