"""Train a diffusion policy from a scripted expert's demonstrations, in dynamic rank, and roll it out.

With no argument: lerobot's DiffusionPolicy (a U-Net of Conv1d) learns to push a block to a goal (FetchPush), dense, by
`auto`, in a fixed rank and by `drift`, three seeds each, on one thread; runs that the file of records holds are not run
again. `--dagger` trains in rounds: the expert takes over with a probability that falls, and what it does is learned as
well (DRIFT-DAgger, arXiv 2502.03822).

    python recipes/train_diffusion_policy.py expert
    python recipes/train_diffusion_policy.py
    python recipes/train_diffusion_policy.py run --methods dense drift --seeds 0 --dagger
    python recipes/train_diffusion_policy.py run --methods "factored:0.125@0 dense@60%"
    python recipes/train_diffusion_policy.py table
    python recipes/train_diffusion_policy.py speed

What it shows: success over roll-outs with an interval, seconds per update, parameters trained, loss. When low rank does
not help: layers this small gain little time, and adapters (`drift`) none, since the frozen base is computed as well.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fetch_push import Arena, Demonstrations, Rollouts, expert_chunks
from lerobot_policy import Scale, Shape, Windows, chunks_of, new_policy
from policy_records import Records, share, table
from torch import nn

from hf_drt import DRTConfig, DynamicRank, Schedule, find_targets
from hf_drt.tables import markdown_table

METHODS = {
    "dense": None,
    "auto": "auto",
    "fixed": "lowrank:0.25@0",
    "drift": "drift(first=0.5,last=0.125)",
}
"""Schedules by name; of None hf_drt takes no part."""
HELD_OUT = Demonstrations(count=20, first_seed=50_000)
ROLLOUT_SEED, DAGGER_SEED = 100_000, 200_000
SPEED_DEMONSTRATIONS, SPEED_TURNS = 20, 11
DAGGER_BEGINS_WITH = 20
"""Demonstrations."""


@dataclass(frozen=True)
class Dagger:
    """Rounds of training and of roll-outs in which the expert takes over.

    Attributes:
        rounds: Of training; roll-outs come between them.
        episodes: Of the roll-outs after a round.
        first: Probability, at each chunk of actions of the first roll-outs, that the expert takes over to the end.
        decay: What it is multiplied by from round to round.
    """

    rounds: int = 4
    episodes: int = 16
    first: float = 0.5
    decay: float = 0.5


@dataclass(frozen=True)
class Settings:
    """What makes up a run; equal ones are not run twice."""

    method: str
    schedule: str | None
    seed: int
    updates: int = 600
    batch_size: int = 32
    learning_rate: float = 1e-3
    rollouts: int = 50
    shape: Shape = Shape()
    demonstrations: Demonstrations = Demonstrations()
    dagger: Dagger | None = None


class Meter:
    """Seconds of updates, of this process and of the wall; the first, which warms up, does not count."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def timed(self, work: Callable[[], Any]) -> Any:
        """Do it, and write down how long it took."""
        cpu, wall = time.process_time(), time.perf_counter()
        result = work()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)
        return result

    @property
    def mean(self) -> tuple[float, float]:
        """Seconds of an update, with the changes of form."""
        return statistics.fmean(self.cpu[1:] or self.cpu), statistics.fmean(self.wall[1:] or self.wall)


class Training:
    """A policy on its way through the updates: a loop of torch, with hf_drt in two lines of it."""

    def __init__(self, settings: Settings, windows: Windows):
        torch.manual_seed(settings.seed)
        self.settings, self.windows, self.step = settings, windows, 0
        self.policy = new_policy(settings.shape)
        self.share = self._share_of_targets()
        self.drt = None
        if settings.schedule is not None:
            config = DRTConfig(schedule=settings.schedule, seed=settings.seed, start=_start(settings.schedule))
            self.drt = DynamicRank(self.policy, config, settings.updates)
            self.drt.apply(0)
        self.optimizer = torch.optim.AdamW(self._trained(), lr=settings.learning_rate, weight_decay=1e-6)
        if self.drt is not None:
            self.drt.install(self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self.meter, self.losses, self.trained = Meter(), [], []
        self.generator = torch.Generator().manual_seed(settings.seed)

    def run(self, updates: int) -> None:
        """So many updates."""
        self.policy.train()
        for _ in range(updates):
            self.losses.append(self.meter.timed(self._update))
            self.trained.append(sum(p.numel() for p in self._trained()))
            self.step += 1
        self.policy.eval()

    def _update(self) -> float:
        if self.drt is not None:
            self.drt.begin_step(self.step, self.optimizer)
        numbers = torch.randint(len(self.windows), (self.settings.batch_size,), generator=self.generator)
        loss, _ = self.policy(self.windows.batch(numbers))
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.policy.parameters() if parameter.requires_grad]

    def _share_of_targets(self) -> float:
        targets = find_targets(self.policy).targets.values()
        return sum(layer.weight.numel() for layer in targets) / sum(p.numel() for p in self.policy.parameters())

    def _rate(self, step: int) -> float:
        """Up in the first 5 % of the updates, then down to 0 as a half cosine."""
        warmup = max(1, self.settings.updates // 20)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.settings.updates - warmup)
        return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, done))).item())


def _start(schedule: str) -> str:
    """That the policy is new, where the schedule asks for it."""
    return "scratch" if Schedule.parse(schedule).writes_lowrank else "auto"


# ---- a run


def trained(settings: Settings, arena: Arena, cache: Path) -> dict[str, Any]:
    """Train, roll out, and say what came of it."""
    episodes = settings.demonstrations.load(cache)
    scale = Scale.of(episodes)
    training = Training(settings, Windows(episodes, settings.shape.horizon, scale))
    print(f"hf_drt selects {training.share:.1%} of the policy's parameters", flush=True)
    rounds = train_in_rounds(training, arena) if settings.dagger else training.run(settings.updates)
    rollouts = rolled_out(training, arena, range(ROLLOUT_SEED, ROLLOUT_SEED + settings.rollouts))
    cpu, wall = training.meter.mean
    tail = training.losses[-max(1, settings.updates // 10) :]
    return {
        "successes": int(rollouts.success.sum()), "rollouts": settings.rollouts, "cpu_per_update": cpu,
        "wall_per_update": wall, "chunk_ms": chunk_ms(training), "share_selected": training.share,
        "parameters": sum(p.numel() for p in training.policy.parameters()),
        "trained": list(dict.fromkeys(training.trained)), "loss": statistics.fmean(tail),
        "held_out_loss": held_out_loss(training, HELD_OUT, cache),
    } | ({"rounds": rounds} if rounds else {})  # fmt: skip


def rolled_out(training: Training, arena: Arena, seeds: range, takes_over: float = 0.0) -> Rollouts:
    """The policy as it is, in environments of these seeds."""
    draw = torch.Generator().manual_seed(1000 + training.settings.seed)
    chunks = chunks_of(training.policy, training.windows.scale, draw)
    return arena.roll_out(chunks, seeds, takes_over, training.settings.seed)


def train_in_rounds(training: Training, arena: Arena) -> list[dict[str, float]]:
    """DAgger with an expert that takes over (Ross et al. 2011; Kelly et al. 2019; DRIFT-DAgger, arXiv 2502.03822).

    After each round but the last the policy is rolled out; at every chunk the expert takes over with a probability that
    falls from round to round, and keeps going to the end. What it did joins the demonstrations.

    Returns:
        Of each round: the probability, seconds of an update, those of the roll-outs, and what they gave.
    """
    given, updates, seed, rows = training.settings.dagger, training.settings.updates, DAGGER_SEED, []
    for number in range(given.rounds):
        begun = len(training.meter.cpu)
        training.run(updates * (number + 1) // given.rounds - updates * number // given.rounds)
        row = {"cpu_per_update": statistics.fmean(training.meter.cpu[begun:])}
        if number + 1 < given.rounds:
            probability, started = given.first * given.decay**number, time.process_time()
            rollouts = rolled_out(training, arena, range(seed, seed + given.episodes), probability)
            training.windows.add(rollouts.taught)
            seed += given.episodes
            taught = sum(len(episode.actions) for episode in rollouts.taught)
            row |= {
                "probability": probability, "taken_over": len(rollouts.taught) / given.episodes, "taught": taught,
                "success": rollouts.success.mean().item(), "rollout_cpu": time.process_time() - started,
            }  # fmt: skip
        rows.append(row)
    return rows


@torch.no_grad()
def held_out_loss(training: Training, demonstrations: Demonstrations, cache: Path) -> float:
    """The training loss on demonstrations that were not trained on, with the same noise for all methods."""
    windows = Windows(demonstrations.load(cache), training.settings.shape.horizon, training.windows.scale)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return training.policy(windows.batch(torch.arange(len(windows))))[0].item()


def chunk_ms(training: Training, repeats: int = 7) -> float:
    """CPU milliseconds of one prediction for one environment: the median."""
    predict = chunks_of(training.policy, training.windows.scale, torch.Generator().manual_seed(0))
    state, times = training.windows.states[:1].numpy(), []
    for _ in range(repeats):
        started = time.process_time()
        predict(state, [0])
        times.append(time.process_time() - started)
    return 1000 * statistics.median(times)


# ---- commands


def run(given: argparse.Namespace) -> None:
    """Every method and seed that has no record yet; a line for each."""
    records, arena = Records(given.records), Arena()
    for seed in given.seeds:
        for method in given.methods:
            settings = settings_of(given, method, seed)
            record = records.find(asdict(settings) | {"held_out": asdict(HELD_OUT)})
            done = record is not None
            if record is None:
                results = trained(settings, arena, given.cache_dir)
                record = records.add(asdict(settings) | {"held_out": asdict(HELD_OUT)}, results)
            print(
                f"{settings.method}, seed {seed}: success {share(record['successes'], record['rollouts'])}, "
                f"{record['cpu_per_update']:.3f} CPU s/update, held-out loss {record['held_out_loss']:.4f}"
                f"{' (recorded)' if done else ''}",
                flush=True,
            )


def settings_of(given: argparse.Namespace, method: str, seed: int) -> Settings:
    """The settings of one run from the command line."""
    schedule = METHODS.get(method, method)
    settings = Settings(
        method=f"{method}, DAgger" if given.dagger else method, schedule=schedule, seed=seed, updates=given.updates,
        batch_size=given.batch_size, learning_rate=given.learning_rate, rollouts=given.rollouts,
        shape=Shape(widths=tuple(given.widths)),
    )  # fmt: skip
    if given.dagger:
        few = replace(settings.demonstrations, count=given.dagger_demonstrations or DAGGER_BEGINS_WITH)
        return replace(settings, demonstrations=few, dagger=Dagger())
    if given.demonstrations is None:
        return settings
    return replace(settings, demonstrations=replace(settings.demonstrations, count=given.demonstrations))


def look_at_expert(given: argparse.Namespace) -> None:
    """The expert's success, in the environments that policies are rolled out in."""
    seeds = range(ROLLOUT_SEED, ROLLOUT_SEED + given.rollouts)
    rollouts = Arena().roll_out(expert_chunks(), seeds, takes_over=1.0)
    print(f"expert: success {share(int(rollouts.success.sum()), given.rollouts)} of {given.rollouts} roll-outs")


def print_table(given: argparse.Namespace) -> None:
    """The records' table, in Markdown."""
    records = Records(given.records).all
    if not records:
        raise SystemExit(f"{given.records} holds no record. Make some: python recipes/train_diffusion_policy.py run")
    print(table(records))


def speed(given: argparse.Namespace) -> None:
    """CPU time of an update and of a prediction by method, at the beginning of a run. Methods take turns, so that what
    else the machine does meets all; the first two turns warm up."""
    trainings = []
    for method in given.methods:
        settings = settings_of(given, method, given.seeds[0])
        episodes = replace(settings.demonstrations, count=SPEED_DEMONSTRATIONS).load(given.cache_dir)
        trainings.append(Training(settings, Windows(episodes, settings.shape.horizon, Scale.of(episodes))))
    for _ in range(SPEED_TURNS + 2):
        for training in trainings:
            training.run(1)
    rows = []
    for method, training in zip(given.methods, trainings, strict=True):
        update = 1000 * statistics.median(training.meter.cpu[2:])
        rows.append((method, update, chunk_ms(training), training.trained[-1]))
    first = rows[0]
    print(markdown_table(
        ("method", "CPU ms/update", f"of {first[0]}", "CPU ms/chunk", f"of {first[0]}", "trained"),
        [(method, f"{update:.0f}", f"{update / first[1]:.2f}", f"{chunk:.0f}", f"{chunk / first[2]:.2f}", f"{count:,}")
         for method, update, chunk, count in rows],
    ))  # fmt: skip


COMMANDS = {"run": run, "expert": look_at_expert, "speed": speed, "table": print_table}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    default = Settings("", None, 0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "command",
        nargs="?",
        default="run",
        choices=COMMANDS,
        help="Train, look at the expert, time updates, or print the table.",
    )
    add("--methods", nargs="+", default=list(METHODS), help=f"Of {', '.join(METHODS)}; or the text of a schedule.")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--updates", type=int, default=default.updates, help="Update steps.")
    add("--batch_size", type=int, default=default.batch_size, help="Windows of an update.")
    add("--learning_rate", type=float, default=default.learning_rate, help="Peak rate of AdamW.")
    add("--rollouts", type=int, default=default.rollouts, help="Episodes in which success is counted.")
    add("--demonstrations", type=int, help=f"Episodes of the expert; unset: {default.demonstrations.count}.")
    add("--widths", type=int, nargs="+", default=list(default.shape.widths), help="Channels of the U-Net by level.")
    add("--dagger", action="store_true", help="In rounds, in which the expert takes over ever more rarely.")
    add("--dagger_demonstrations", type=int, help=f"Episodes that DAgger begins with; unset: {DAGGER_BEGINS_WITH}.")
    add("--records", type=Path, default=Path("runs/diffusion_policy.jsonl"), help="File of the records.")
    add("--cache_dir", type=Path, default="~/.cache/hf_drt", help="Folder in which demonstrations are kept.")
    given = parser.parse_args(arguments)
    given.cache_dir = given.cache_dir.expanduser()
    for name in ("updates", "batch_size", "rollouts", "demonstrations", "dagger_demonstrations"):
        if getattr(given, name) is not None and getattr(given, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(given, name)}.")
    if given.learning_rate <= 0:
        parser.error(f"--learning_rate must be above 0, got {given.learning_rate:g}.")
    if given.dagger_demonstrations is not None and not given.dagger:
        parser.error("--dagger_demonstrations has no effect without --dagger. Leave it out, or give --dagger.")
    if given.demonstrations is not None and given.dagger:
        parser.error("--demonstrations has no effect with --dagger, which begins with --dagger_demonstrations.")
    _check_widths(parser, given.widths)
    if given.command in ("run", "speed"):
        _check_methods(parser, given.methods)
    return given


def _check_widths(parser: argparse.ArgumentParser, widths: list[int]) -> None:
    factor = 2 ** len(widths)
    if Shape().horizon % factor:
        parser.error(f"--widths has {len(widths)} levels, which halve {Shape().horizon} actions; give 3 at most.")
    if bad := [width for width in widths if width < 8 or width % 8]:
        parser.error(f"--widths must be multiples of 8, the groups of the norms, got {bad[0]}.")


def _check_methods(parser: argparse.ArgumentParser, methods: list[str]) -> None:
    for method in methods:
        text = METHODS.get(method, method)
        try:
            Schedule.parse(text or "dense@0")
        except ValueError as error:
            parser.error(f"--methods {method}: it is none of {', '.join(METHODS)}, and no schedule: {error}")


def main(arguments: list[str] | None = None) -> None:
    """Run a command."""
    given = parse(arguments)
    torch.set_num_threads(1)  # CPU seconds are then those of the work
    COMMANDS[given.command](given)


if __name__ == "__main__":
    main(sys.argv[1:])
