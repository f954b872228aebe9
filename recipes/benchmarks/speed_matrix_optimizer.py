"""The matrix optimizer next to AdamW: update steps of a Llama's blocks, factored and dense, and the optimizer's state.

    python recipes/benchmarks/speed_matrix_optimizer.py [--ranks 48 96 192] [--tokens-per-rank 35 70]

What it shows: a stack of Llama blocks whose factors, and whose dense weights, are trained once by AdamW and once by
`matrix_optimizer="muon"`, on the same tokens: as many as --tokens-per-rank times the rank, rounded up to whole samples.
The four take turns in one process. Seconds are CPU seconds on one thread, medians over the rounds; the optimizer's part
is measured inside the same steps. "predicted" is its part by multiply-adds, of the target layers alone: without head,
attention and element-wise operations. State is that of the target layers.
"""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import speed_kit as kit
import torch
from torch import Tensor

from hf_drt import DynamicRank
from hf_drt.forms import trainable_weights
from hf_drt.planning import update_tokens

MIB = 2**20


@dataclass
class Run:
    """A model, its optimizer, and the seconds of its steps: of the whole, and of the optimizer in them."""

    drt: DynamicRank
    optimizer: torch.optim.Optimizer
    whole: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def step(self, ids: Tensor) -> None:
        started = kit.clock()
        self.drt.model(input_ids=ids, labels=ids).loss.backward()
        self.update.append(kit.timed(self.optimizer.step))
        self.optimizer.zero_grad()
        self.whole.append(kit.clock() - started)

    def medians(self, warmup: int = 1) -> tuple[float, float]:
        return statistics.median(self.whole[warmup:]), statistics.median(self.update[warmup:])

    def state(self) -> int:
        """Bytes of the optimizer's state of the target layers."""
        layers = (self.drt.model.get_submodule(name) for name in self.drt.targets)
        states = (self.optimizer.state[weight] for layer in layers for weight in trainable_weights(layer))
        return sum(t.numel() * t.element_size() for state in states for t in state.values() if torch.is_tensor(t))

    def predicted(self, tokens: int) -> float:
        """Share of the optimizer's multiply-adds in those of the target layers' training and its own."""
        drt = self.drt
        cost = update_tokens(list(drt.targets.values()), list(drt.forms(0).values()), list(drt.copies.values()))
        return cost / (cost + tokens)


def made(chosen, schedule: str, **config: object) -> Run:
    drt = kit.dynamic(kit.llama(chosen), schedule, **config)
    optimizer = kit.adamw(drt.model)
    drt.install(optimizer)
    return Run(drt, optimizer)


def pair(make: Callable[..., Run]) -> dict[str, Run]:
    return {"AdamW": make(), "muon": make(matrix_optimizer="muon")}


def take_turns(runs: Iterable[Run], ids: Tensor, rounds: int, warmup: int = 1) -> None:
    for _ in range(warmup + rounds):
        for run in runs:
            run.step(ids)


def row(weights: str, tokens: int, runs: dict[str, Run]) -> list[str]:
    (adamw, adamw_update), (muon, update) = (runs[name].medians() for name in ("AdamW", "muon"))
    states = [runs[name].state() for name in ("AdamW", "muon")]
    return [
        weights, f"{tokens:,}", f"{adamw:.2f}", f"{muon:.2f}", f"{muon / adamw:.3f}", f"{adamw_update / adamw:.1%}",
        f"{update / muon:.1%}", f"{runs['muon'].predicted(tokens):.1%}",
        *(f"{state / MIB:.1f}" for state in states), f"{states[1] / states[0]:.2f}",
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = kit.parser(__doc__, layers=2, vocab=2048, rounds=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[48, 96, 192])
    parser.add_argument("--tokens-per-rank", type=int, nargs="+", default=[35, 70])
    parser.add_argument("--only", choices=["factored", "dense"], help="leave the other out")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for rank in chosen.ranks:
        for multiple in chosen.tokens_per_rank:
            batch = -(-multiple * rank // chosen.length)
            ids, tokens = kit.tokens(chosen, batch), batch * chosen.length
            found = {}
            if chosen.only != "dense":
                found[f"factors {rank}"] = pair(lambda rank=rank, **more: made(chosen, "factored@0", rank=rank, **more))
            if chosen.only != "factored":
                found["dense"] = pair(lambda **more: made(chosen, "dense@0", **more))
            take_turns([run for runs in found.values() for run in runs.values()], ids, chosen.rounds)
            rows += [row(name, tokens, runs) for name, runs in found.items()]
    title = f"Update step, {chosen.layers} blocks of width {chosen.hidden}, one thread"
    header = ["weights", "tokens", "AdamW s", "muon s", "over AdamW", "AdamW in step", "muon in step", "predicted",
              "AdamW MiB", "muon MiB", "ratio"]  # fmt: skip
    kit.show(title, header, rows, width=150)


if __name__ == "__main__":
    main()
