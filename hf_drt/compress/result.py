"""What a compression does, or has done: by layer, in all, and as a table."""

import math
from dataclasses import dataclass

from hf_drt.forms import Factored, Form
from hf_drt.tables import plain_table

DEEP, LARGE = 0.95, 0.05  # from which share of the parameters, and which relative error, weights alone are warned of


@dataclass(frozen=True)
class LayerCompression:
    """What becomes of one layer.

    Attributes:
        shape: ``(out, in)``.
        form: Factored, or Dense where factors would save nothing.
        error: Relative Frobenius error of the effective weight, ``||W_r - W||_F / ||W||_F``; with calibration that of
            the outputs over its inputs, ``||(W_r - W) C^(1/2)||_F / ||W C^(1/2)||_F`` with C as in
            :func:`hf_drt.linalg.shrunk`, and with a budget shared out by harm that of the outputs weighed by how the
            loss depends on them (:func:`hf_drt.linalg.fisher_truncation`).
        parameters: Stored weights before and after, bias aside.
    """

    name: str
    shape: tuple[int, int]
    form: Form
    error: float
    parameters: tuple[int, int]

    @property
    def rank(self) -> int | None:
        """Rank of the factors; None for a dense layer."""
        return self.form.rank if isinstance(self.form, Factored) else None


@dataclass(frozen=True)
class Trial:
    """A budget shared out in one way, and what the model's loss on the calibration batches is with it.

    Attributes:
        allocation: How it is shared out: 'harm' or 'uniform'; 'dense' is the model as it was.
        loss: Mean over the batches.
        parameters: Of the target layers.
    """

    allocation: str
    loss: float
    parameters: int


@dataclass(frozen=True)
class Compression:
    """What a compression does, or has done; ``str()`` is a table.

    Attributes:
        criterion: What decided the ranks, such as 'energy=0.9'.
        layers: The target layers in the model's order.
        model_parameters: Of the whole model, before and after.
        loss: What ``evaluate`` gave before and after; None where nothing was evaluated.
        calibrated: Whether the inputs of calibration batches weigh the errors.
        allocation: How a budget is shared out among the layers: 'harm', 'error' or 'uniform'; None for other criteria.
        trials: What was measured on the calibration batches to choose it, the model as it was first.
    """

    criterion: str
    layers: tuple[LayerCompression, ...]
    model_parameters: tuple[int, int]
    loss: tuple[float, float] | None = None
    calibrated: bool = False
    allocation: str | None = None
    trials: tuple[Trial, ...] = ()

    @property
    def parameters(self) -> tuple[int, int]:
        """Stored weights of the target layers, before and after."""
        before, after = (sum(layer.parameters[side] for layer in self.layers) for side in (0, 1))
        return before, after

    @property
    def flops(self) -> float:
        """Multiply-adds per token of the target layers' forward pass, after over before.

        A linear layer does one per stored weight, so this is the share of parameters too.
        """
        before, after = self.parameters
        return after / before

    @property
    def squared_error(self) -> float:
        """Sum over the layers of the squared relative error: what a budget minimises with ``allocation="error"``."""
        return sum(layer.error**2 for layer in self.layers)

    @property
    def loss_difference(self) -> float | None:
        """What it costs: ``evaluate`` after minus before."""
        return None if self.loss is None else self.loss[1] - self.loss[0]

    @property
    def warning(self) -> str | None:
        """What to expect of a deep cut without calibration, which ends in a model that is of little use; else None."""
        error = math.sqrt(self.squared_error / len(self.layers))
        if self.calibrated or self.flops > DEEP or error < LARGE:
            return None
        return (
            f"{self.flops:.2f} of the target layers' parameters are kept, by the weights alone (relative error "
            f"{error:.2f} on average): expect a model that has to be trained again. SmolLM2-135M, cut so to 0.8, was "
            "hardly better than guessing (recipes/compress_lm.py). Calibrate it on texts or batches like its own."
        )

    def __str__(self) -> str:
        columns = ("layer", "out x in", "rank", "error", "before", "after", "share")
        factored = sum(layer.rank is not None for layer in self.layers)
        weighed = ", errors of outputs on the calibration" if self.calibrated else ""
        shared = f", shared out by {self.allocation}" if self.allocation else ""
        lines = [
            f"compression by {self.criterion}{shared}: {factored} of {len(self.layers)} layers in factors{weighed}",
            plain_table(columns, [_row(layer) for layer in self.layers]),
            f"target layers: {_change(*self.parameters)}; forward FLOPs x {self.flops:.3f}",
            f"whole model: {_change(*self.model_parameters)}",
        ]
        if self.trials:
            lines.append(f"loss on the calibration: {'; '.join(map(self._tried, self.trials))}")
        if self.loss is not None:
            lines.append(f"loss: {self.loss[0]:.4f} -> {self.loss[1]:.4f} ({self.loss_difference:+.4f})")
        return "\n".join(lines)

    def _tried(self, trial: Trial) -> str:
        taken = " (taken)" if trial.allocation == self.allocation else ""
        return f"{trial.allocation} {trial.loss:.4f} at {trial.parameters:,} parameters{taken}"


def _row(layer: LayerCompression) -> tuple[str, ...]:
    before, after = layer.parameters
    rank = "dense" if layer.rank is None else str(layer.rank)
    shape = f"{layer.shape[0]} x {layer.shape[1]}"
    return layer.name, shape, rank, f"{layer.error:.4f}", f"{before:,}", f"{after:,}", f"{after / before:.3f}"


def _change(before: int, after: int) -> str:
    return f"{before:,} -> {after:,} parameters ({after / before:.3f})"
