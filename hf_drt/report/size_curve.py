"""A picture of a model's loss over its size. Needs ``matplotlib`` (extra ``report``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from hf_drt.report.figures import STYLE


def write_size_curve(
    sizes: Sequence[int], losses: Sequence[float], marks: Mapping[str, tuple[int, float]], path: Path
) -> None:
    """Draw loss over parameters as a line, and single models as marks with their names.

    Args:
        sizes, losses: Of the points of the line; the largest is the model as it was, whose loss is a line across.
        marks: Parameters and loss by name.
        path: Ends in a kind of picture that matplotlib writes, such as .svg; is written over.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2, 2.8), layout="constrained")
        axes = figure.add_subplot()
        millions = [size / 1e6 for size in sizes]
        whole = losses[sizes.index(max(sizes))]
        axes.axhline(whole, color="#707880", linewidth=0.8, linestyle="--", label="as it was")
        axes.plot(millions, losses, marker="o", color="#0072b2", label="compressed")
        for (name, (size, loss)), marker in zip(marks.items(), "*Ds^", strict=False):
            axes.plot(size / 1e6, loss, marker, markersize=8, color="#d55e00", label=name)
        axes.set_xlabel("parameters of the target layers, millions")
        axes.set_ylabel("loss")
        axes.legend()
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
