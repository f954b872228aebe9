"""Accuracy as an ``evaluate.Metric`` that needs no network: ``evaluate.load("accuracy")`` fetches its code first."""

# On separate lines, or evaluate cannot load a metric from this file's path.
import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """Share of predictions that equal their reference, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: class numbers, equally many of both.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        hits = sum(int(p == r) for p, r in zip(predictions, references, strict=True))
        return {"accuracy": hits / len(references)}
