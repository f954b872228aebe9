"""What dynamic rank itself costs in a model of many layers: CPU time for each layer, by the number of layers.

    python recipes/benchmarks/speed_many_layers.py
    python recipes/benchmarks/speed_many_layers.py --against PATH_OF_ANOTHER_CHECKOUT

A model of 32 blocks, each with two linear layers of 64 x 32 and experts of two each, as separate layers: with 128
experts 8,256 of them. Where cost grows with the work, the time for each layer is the same in all columns; small layers
leave nothing but that cost. Gradients are made up, so that the optimizer has state.

With --against one size (--compare, experts in a block) is measured in this checkout and in another one, each in a
process of its own: seconds, and their ratio.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import speed_kit as kit
import torch
from torch import Tensor, nn

from hf_drt import DRTConfig, DynamicRank

ROOT = Path(__file__).parents[2]
COMPARED = ("first phase", "install", "switch")


class Pair(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Block(Pair):
    """Two linear layers, and experts as a list of separate layers."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Pair() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(expert(x) for expert in self.experts)


class Model(nn.Module):
    def __init__(self, blocks: int, experts: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 32)
        self.blocks = nn.ModuleList(Block(experts) for _ in range(blocks))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return x


def layers_of(blocks: int, experts: int) -> int:
    return blocks * 2 * (experts + 1)


Work = Iterator[tuple[str, Callable[[], object]]]


def works(blocks: int, experts: int, folder: str) -> Work:
    """Pieces of work of one run, in order; each has to be done before the next is asked for."""
    torch.manual_seed(0)
    model = Model(blocks, experts)
    config = DRTConfig(schedule="factored@0 dense@50%", rank=8)
    yield "find_targets", lambda: select(model)
    drt = DynamicRank(model, config, max_steps=10)
    yield "DynamicRank", lambda: DynamicRank(model, config, max_steps=10)
    yield "first phase", lambda: drt.apply(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    yield "install", lambda: drt.install(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    yield "effective ranks", drt.effective_ranks
    yield "switch", lambda: drt.apply(5, optimizer)
    yield "state_dict", drt.state_dict
    yield from _checkpoint(drt, optimizer, folder)
    state = drt.state_dict()
    torch.manual_seed(0)
    model = Model(blocks, experts)
    other = DynamicRank(model, config, max_steps=10)
    other.apply(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    other.install(optimizer)
    yield "load_state_dict", lambda: other.load_state_dict(state, optimizer)


def select(model: nn.Module) -> object:
    from hf_drt.targets import find_targets  # here, since older checkouts have it elsewhere

    return find_targets(model)


def _checkpoint(drt: DynamicRank, optimizer: torch.optim.Optimizer, folder: str) -> Work:
    from safetensors.torch import save_file
    from transformers.trainer_callback import TrainerState

    from hf_drt.checkpoint import write_state
    from hf_drt.trainer.checkpoint import check_optimizer, checked_state

    state, step = drt.state_dict(), 5
    yield "state file", lambda: write_state(folder, state | {"step": step})
    path = Path(folder)
    save_file(
        {name: tensor.contiguous() for name, tensor in drt.model.state_dict().items()}, path / "model.safetensors"
    )
    TrainerState(global_step=step).save_to_json(str(path / "trainer_state.json"))
    for name, content in (("optimizer", optimizer.state_dict()), ("scheduler", {})):
        torch.save(content, path / f"{name}.pt")
    torch.save({}, path / "rng_state.pth")

    def check() -> None:
        checked_state(folder, drt, for_resume=True)
        check_optimizer(folder, optimizer)

    yield "check of a checkpoint", check


def measured(blocks: int, experts: int, wanted: Sequence[str] | None = None) -> dict[str, float]:
    """CPU seconds of each piece of work, or of those wanted and no others."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, work in works(blocks, experts, folder):
            if wanted is None or name in wanted:
                seconds[name] = kit.timed(work)
            if wanted is not None and name == wanted[-1]:
                break
    return seconds


def by_size(chosen: argparse.Namespace) -> None:
    """The table of times for each layer."""
    sizes = [layers_of(chosen.blocks, experts) for experts in chosen.experts]
    measured(1, 1)  # what is read and imported once
    columns = []
    for experts, size in zip(chosen.experts, sizes, strict=True):
        rounds = [measured(chosen.blocks, experts) for _ in range(max(1, min(chosen.rounds, 8192 // size)))]
        columns.append({name: statistics.median(r[name] for r in rounds) / size for name in rounds[0]})
    rows = []
    for name in columns[0]:
        values = [column[name] for column in columns]
        rows.append([name, *(f"{1e6 * value:.1f}" for value in values), f"{values[-1] / values[0]:.2f}"])
    kit.show("CPU microseconds for each layer", ["layers", *(f"{size:,}" for size in sizes), "last / first"], rows)


def against(chosen: argparse.Namespace) -> None:
    """The table of this checkout and another one."""
    here, there = (_in_process(path, chosen) for path in (ROOT, chosen.against))
    rows = [[name, f"{there[name]:.2f}", f"{here[name]:.2f}", f"{here[name] / there[name]:.3f}"] for name in here]
    title = f"CPU seconds, {layers_of(chosen.blocks, chosen.compare):,} layers"
    kit.show(title, ["work", "other checkout", "this one", "ratio"], rows)


def _in_process(path: Path, chosen: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--blocks", str(chosen.blocks), "--compare", str(chosen.compare), "--json"]
    environment = os.environ | {"PYTHONPATH": str(path.resolve())}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--experts", type=int, nargs="+", default=[7, 31, 128, 468], help="in a block, by column")
    parser.add_argument("--rounds", type=int, default=5, help="of the smaller sizes; medians are shown")
    parser.add_argument("--against", type=Path, help="root of a checkout to compare with")
    parser.add_argument("--compare", type=int, default=128, help="experts in a block, for --against")
    parser.add_argument("--json", action="store_true", help="the size of --compare alone, as JSON")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if chosen.json:
        measured(1, 1, COMPARED)
        print(json.dumps(measured(chosen.blocks, chosen.compare, COMPARED)))
    elif chosen.against is not None:
        against(chosen)
    else:
        by_size(chosen)


if __name__ == "__main__":
    main()
