"""What a recovery has regained: by stage, by layer, and as a table."""

from dataclasses import dataclass

from hf_drt.compress import Compression
from hf_drt.tables import plain_table


@dataclass(frozen=True)
class Stage:
    """The model at one point of a recovery, on the calibration batches that are kept aside for it.

    Attributes:
        name: 'dense', the reference; 'compressed', 'least squares' or 'training'.
        distance: Of its outputs from the reference's (:func:`hf_drt.recovery.distance`).
        loss: The model's own; None where the batches give none.
        seconds: That it took.
        kept: Whether what it did stays: a stage that ends farther away is undone.
    """

    name: str
    distance: float
    loss: float | None
    seconds: float
    kept: bool = True


@dataclass(frozen=True)
class LayerRecovery:
    """One layer's outputs against those that it has in the reference, on the same batches.

    Attributes:
        rank: Of its factors.
        errors: ``||y' - y||_F / ||y||_F`` before and after, with all that the layers before it have done to its inputs.
    """

    name: str
    rank: int
    errors: tuple[float, float]


@dataclass(frozen=True)
class Recovery:
    """What a recovery has done; ``str()`` is a table.

    Attributes:
        layers: Those that were trained, in the model's order.
        stages: In order, the reference first.
        steps: Updates that were made.
        compression: What went before, where one call has done both.
        losses: What ``evaluate`` gave of the dense, the compressed and the recovered model; None where nothing was
            evaluated.
    """

    layers: tuple[LayerRecovery, ...]
    stages: tuple[Stage, ...]
    steps: int
    compression: Compression | None = None
    losses: tuple[float, float, float] | None = None

    @property
    def regained(self) -> float:
        """Share of the distance between the compressed model and the reference that is gone, in [0, 1]."""
        before = self.stages[1].distance
        return 1 - min(stage.distance for stage in self.stages[1:]) / before if before > 0 else 0.0

    def __str__(self) -> str:
        layers = [(layer.name, str(layer.rank), *(f"{error:.4f}" for error in layer.errors)) for layer in self.layers]
        stages = [
            (stage.name, f"{stage.distance:.4f}", "" if stage.loss is None else f"{stage.loss:.4f}",
             f"{stage.seconds:.1f}", "" if stage.kept else "undone")
            for stage in self.stages
        ]  # fmt: skip
        lines = [
            f"recovery by {self.steps} updates: {self.regained:.0%} of the distance from the dense model regained",
            plain_table(("layer", "rank", "error before", "after"), layers),
            plain_table(("stage", "distance", "loss", "seconds", ""), stages),
        ]
        if self.losses is not None:
            dense, compressed, recovered = self.losses
            lines.append(f"loss: {dense:.4f}; compressed {compressed:.4f}; recovered {recovered:.4f}")
        return "\n".join(lines)
