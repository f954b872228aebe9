"""The section of a model card that says how a model was trained in changing rank, and how to load it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_drt.registry import EXPORTERS
from hf_drt.schedule import Kind, Plan, Span, draw_timeline, spans, timelines
from hf_drt.tables import markdown_table

TAGS = ("hf_drt", "dynamic-rank-training", "low-rank")
TIMELINE_NAME = "drt_timeline.png"

CITATION = """\
@article{shin2025dynamic,
  title         = {Dynamic Rank Adjustment for Accurate and Efficient Neural Network Training},
  author        = {Shin, Hyuntak and Jung, Aecheon and Hong, Sungeun and Lee, Sunwoo},
  year          = {2025},
  eprint        = {2508.08625},
  archivePrefix = {arXiv}
}"""

HOME = "https://github.com/hf-drt/hf_drt"


@dataclass(frozen=True)
class PhaseSummary:
    """One phase, as it ran or was planned.

    Attributes:
        kind: Form of the target layers; 'mixed' where they are not all in one.
        form: As the plan has it, where that says more.
        start, end: Update steps ``[start, end)``.
        ranks: Smallest and largest rank of a target layer; None where all are dense.
        flops: Multiply-adds of the target layers relative to dense training.
        trainable: Trainable parameters of the model; None if the phase was not reached, as in the next two.
        seconds: Wall-clock time.
        effective_rank: Mean over the target layers, at the last measurement.
    """

    kind: Kind
    start: int
    end: int
    ranks: tuple[int, int] | None
    flops: float
    trainable: int | None = None
    seconds: float | None = None
    effective_rank: float | None = None
    form: str | None = None


@dataclass(frozen=True)
class RunSummary:
    """What a card tells of a run.

    Attributes:
        phases: In order.
        layers: Number of target layers.
        flops, parameters: Averages of the plan relative to dense training of the target layers.
        schedule: As the user wrote it.
        settings: Those that differ from their defaults, by name, without the schedule.
        export: Name of the exporter that has written the weights beside the card.
        repository: ``user/name`` on the Hub, or a folder.
        model_class: Name of the class that loads them.
        plan: Whose groups the timeline tells apart, where it has any.
    """

    phases: tuple[PhaseSummary, ...]
    layers: int
    flops: float
    parameters: float
    schedule: str
    settings: dict[str, Any]
    export: str
    repository: str
    model_class: str
    plan: Plan | None = None

    @property
    def rows(self) -> dict[str, Sequence[Span]]:
        """What the timeline shows: the phases, or the forms of each group."""
        rows = spans(self.plan) if self.plan is not None else {}
        return {**rows} if len(rows) > 1 else {"": self.phases}


def renew_card(folder: str | Path) -> None:
    """Take the name of PEFT, for which the Trainer would ask the model to be one of PEFT's, out of an earlier card."""
    path = Path(folder) / "README.md"
    if path.is_file():
        card = ModelCard.load(path)
        data: Any = card.data  # whatever its header holds
        data.library_name = "transformers"
        card.save(path)


def complete_card(folder: str | Path, run: RunSummary) -> None:
    """Add the method to the model card ``README.md`` in a folder: metadata, picture and :func:`method_section`."""
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    data: Any = card.data
    data.tags = list(dict.fromkeys([*(data.tags or []), *TAGS]))
    data.library_name = EXPORTERS[run.export].library
    picture = draw_timeline(run.rows, path.with_name(TIMELINE_NAME))
    card.text = f"{card.text.rstrip()}\n\n{method_section(run, picture)}\n"
    card.save(path)


def method_section(run: RunSummary, picture: bool = False) -> str:
    """Markdown: method, settings, timeline, table of phases, cost against dense, how to load the weights, citation.

    Args:
        run: From the trainer.
        picture: Whether :data:`TIMELINE_NAME` lies beside the card.
    """
    return "\n\n".join(
        (
            "## Dynamic-rank training",
            f"Trained with [`hf_drt`]({HOME}) (`pip install git+{HOME}`): {run.layers} linear layers changed between "
            "full-rank and low-rank form during the run ([arXiv 2508.08625](https://arxiv.org/abs/2508.08625)). By "
            f"plan these target layers take {run.flops:.2f} of their dense training FLOPs, with "
            f"{run.parameters:.2f} of their trainable parameters on average.",
            _settings(run),
            f"![phases of the run]({TIMELINE_NAME})" if picture else f"```\n{timelines(run.rows)}\n```",
            _table(run.phases),
            f"### Loading\n\n{EXPORTERS[run.export].loading}\n\n```python\n{_code(run)}\n```",
            f"### Citation\n\n```bibtex\n{CITATION}\n```",
        )
    )


def _code(run: RunSummary) -> str:
    return EXPORTERS[run.export].code_for(run.model_class, run.repository)


def _settings(run: RunSummary) -> str:
    """The schedule and what else was set, as the training arguments have them."""
    rows = {"schedule": run.schedule} | run.settings
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in rows.items()}
    return markdown_table(("setting", "value"), [(f"`drt_{name}`", f"`{text}`") for name, text in texts.items()])


def _table(phases: tuple[PhaseSummary, ...]) -> str:
    columns = (
        "phase", "form", "update steps", "rank", "trainable parameters", "FLOPs / dense", "seconds", "effective rank",
    )  # fmt: skip
    rows = [
        (
            str(index), p.form or p.kind, f"{p.start} to {p.end}", _ranks(p.ranks), _number(p.trainable, ","),
            f"{p.flops:.2f}", _number(p.seconds, ",.0f"), _number(p.effective_rank, ".1f"),
        )
        for index, p in enumerate(phases)
    ]  # fmt: skip
    return markdown_table(columns, rows)


def _ranks(ranks: tuple[int, int] | None) -> str:
    if ranks is None:
        return "full"
    low, high = ranks
    return str(low) if low == high else f"{low} to {high}"


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)
