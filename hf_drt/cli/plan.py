"""``hf-drt plan``: what a run will cost."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import PretrainedConfig, get_scheduler
from typer import Option

from hf_drt.cli.measurement import PhaseTime, measured
from hf_drt.cli.output import print_json, progress
from hf_drt.cli.plan_tables import as_json, print_estimate
from hf_drt.cli.source import build, has_weights, read_config
from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.forms import PRODUCTS
from hf_drt.optim import maker
from hf_drt.planning import resolved_plan
from hf_drt.schedule import Plan, Run, Schedule, draw_timeline
from hf_drt.simulate import BatchSpec, Layer, Proposal, RunEstimate, batch_spec, estimate_run, propose
from hf_drt.trainer import simulated_curve

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WINDOWS = (
    "full-rank windows begin during the run, and are not in this plan; with them the target layers take at most {:g} "
    "of their dense FLOPs, and the peak may be that of dense training"
)


@dataclass(frozen=True)
class _Load:
    """How the run trains: what its cost depends on beside model and plan."""

    batch_size: int
    seq_length: int | None
    accumulation: int
    optimizer: str
    dtype: torch.dtype
    bf16: bool
    checkpointing: bool
    task: str | None

    def model(self, config: PretrainedConfig, meta: bool) -> nn.Module:
        return build(config, self.task, self.dtype, meta, self.checkpointing)

    def batch(self, model: nn.Module) -> BatchSpec:
        limit = getattr(model.config.get_text_config(decoder=False), "max_position_embeddings", None)
        default = min(512, limit) if isinstance(limit, int) and limit > 0 else 512
        return batch_spec(model, self.batch_size, self.seq_length or default)

    def __str__(self) -> str:
        length = f", {self.seq_length} tokens" if self.seq_length else ""
        return f"batch {self.batch_size} x {self.accumulation}{length}, {self.optimizer}"

    def arguments(self) -> dict[str, Any]:
        """Of a Trainer."""
        return {
            "per_device_train_batch_size": self.batch_size, "gradient_accumulation_steps": self.accumulation,
            "optim": self.optimizer, "bf16": self.bf16,
        }  # fmt: skip


def plan(
    model: Annotated[str, typer.Argument(help="Folder of a model, its config.json, or a repository on the Hub.")],
    schedule: Annotated[str, Option(help="Phases, e.g. 'factored@0 dense@40% adapter@80%', or a preset.")] = "paper",
    rank_ratio: Annotated[float, Option(help="Rank as a share of min(out, in), in (0, 1].")] = 0.25,
    rank: Annotated[int | None, Option(help="Absolute rank, in place of the ratio.")] = None,
    rank_pattern: Annotated[str | None, Option(help="JSON: regular expression on layer names to rank.")] = None,
    rank_multiple: Annotated[int, Option(help="Ranks given as a share are rounded to a multiple of this.")] = 8,
    decomposition: Annotated[str, Option(help=f"Low-rank structure: {', '.join(PRODUCTS)}.")] = "svd",
    dense_query_key: Annotated[
        bool | None,
        Option(help="Query and key projections stay dense in factored phases; by default in 'auto' only."),
    ] = None,
    include: Annotated[list[str] | None, Option(help="Regular expression on layers; may be repeated.")] = None,
    exclude: Annotated[list[str] | None, Option(help="Regular expression on layers; may be repeated.")] = None,
    blocks: Annotated[list[str] | None, Option(help="Class or pattern of what is a block; may be repeated.")] = None,
    ignore_source: Annotated[
        list[str] | None, Option(help="Regular expression on layers, as drt_ignore_source; may be repeated.")
    ] = None,
    start: Annotated[str, Option(help="auto, scratch or pretrained: what 'lowrank' stands for.")] = "auto",
    task: Annotated[str | None, Option(help="E.g. causal-lm; by default what the configuration says.")] = None,
    steps: Annotated[int, Option(min=1, help="Update steps of the run (max_steps).")] = 1000,
    steps_per_epoch: Annotated[int | None, Option(min=1, help="For boundaries in epochs.")] = None,
    lr_scheduler: Annotated[str, Option(help="lr_scheduler_type, for boundaries at an LR.")] = "linear",
    warmup_steps: Annotated[int, Option(min=0, help="For boundaries at an LR.")] = 0,
    batch_size: Annotated[int, Option(min=1, help="Samples per forward pass.")] = 8,
    seq_length: Annotated[int | None, Option(min=1, help="Tokens per sample; 512 or what the model takes.")] = None,
    accumulation: Annotated[int, Option(min=1, help="Forward passes per update step.")] = 1,
    optimizer: Annotated[str, Option(help="optim of the training arguments.")] = "adamw_torch_fused",
    dtype: Annotated[str, Option(help="Of the weights: float32 or bfloat16.")] = "float32",
    bf16: Annotated[bool, Option("--bf16", help="Mixed precision (autocast).")] = False,
    checkpointing: Annotated[bool, Option("--checkpointing", help="Activation checkpointing.")] = False,
    budget: Annotated[
        float | None,
        Option(
            help="Share of dense FLOPs. 'auto', 'adaptive' and boundaries at 'budget' take it as drt_budget, of the "
            "target layers; for other schedules a rank is proposed that keeps the whole run within it."
        ),
    ] = None,
    layers: Annotated[bool, Option("--layers", help="A table of all target layers too.")] = False,
    measure: Annotated[bool, Option("--measure", help="Time real steps here, and predict the run's length.")] = False,
    measure_steps: Annotated[int, Option(min=2, help="Steps per phase to time; the first is left out.")] = 5,
    picture: Annotated[Path | None, Option(help="Write the timeline as a picture (extra 'report').")] = None,
    json: Annotated[bool, Option("--json", help="JSON in place of tables.")] = False,
) -> None:
    """What a run will cost: FLOPs, parameters and memory of every phase, without weights."""
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"'{dtype}' is none; allowed are {', '.join(_DTYPES)}.", param_hint="--dtype")
    try:
        maker(optimizer)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--optimizer") from None
    config = read_config(model)
    origin = start if start != "auto" else "pretrained" if has_weights(model) else "scratch"
    ranks = {"rank_ratio": rank_ratio, "rank": rank, "rank_pattern": rank_pattern, "rank_multiple": rank_multiple}
    chosen = {"include": include or None, "exclude": exclude or None, "start": origin, "schedule": schedule}
    chosen |= {"blocks": blocks or None, "ignore_source": ignore_source or None}
    chosen |= {"decomposition": decomposition, "dense_query_key": dense_query_key}
    run = Run(steps, steps_per_epoch, _lr_curve(lr_scheduler, warmup_steps, steps))
    settings, parsed = _parsed(ranks | chosen, budget)
    if start == "auto" and all(entry.kind != "lowrank" for entry in parsed.entries):
        settings = replace(settings, start="auto")
    load = _Load(batch_size, seq_length, accumulation, optimizer, _DTYPES[dtype], bf16, checkpointing, task)
    bare = load.model(config, meta=True)
    resolved = _resolved(parsed, run, settings, bare)
    estimate, settings, proposal = _estimated(
        bare, load, settings, resolved, budget if not parsed.uses_budget else None
    )
    if parsed.trigger is not None:
        windows = DynamicRank(bare, settings, plan=resolved, trigger=parsed.trigger).windows
        estimate = replace(estimate, warnings=(*estimate.warnings, _WINDOWS.format(windows.limit)))
    final = proposal.plan if proposal else resolved
    times = _measured(config, load, final, settings, measure_steps) if measure else None
    if json:
        print_json(as_json(estimate, settings, proposal, times))
    else:
        print_estimate(f"{model}, {origin}; {load}", estimate, proposal, times, layers)
    if picture is not None:
        if not draw_timeline(estimate.phases, picture):
            raise ValueError("the picture needs matplotlib: pip install 'hf-drt[report]'.")
        typer.echo(f"{picture} written", err=True)


def _parsed(values: dict[str, Any], budget: float | None) -> tuple[DRTConfig, Schedule]:
    """Settings and schedule; what is wrong with them is a wrong command line."""
    try:
        settings = DRTConfig(**values)
        schedule = Schedule.parse(settings.schedule)
        return replace(settings, budget=budget if schedule.uses_budget else None), schedule
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="the plan") from None


def _resolved(schedule: Schedule, run: Run, settings: DRTConfig, model: nn.Module) -> Plan:
    """The phases; what does not fit the run is a wrong command line too."""
    try:
        return resolved_plan(schedule, run, settings, model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="the plan") from None


def _lr_curve(name: str, warmup: int, steps: int) -> Any:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)

    return simulated_curve(make, 1.0, steps)


def _estimated(
    model: nn.Module, load: _Load, settings: DRTConfig, plan: Plan, budget: float | None
) -> tuple[RunEstimate, DRTConfig, Proposal | None]:
    """The estimate of the plan, or of what is proposed in its place."""
    batch = load.batch(model)
    how = {"optimizer": load.optimizer, "accumulation": load.accumulation}
    how |= {"autocast": torch.bfloat16 if load.bf16 else None}
    controller, proposal = DynamicRank(model, settings, plan=plan), None
    with progress("counting", len(plan) + 1) as tick:
        if budget is not None:
            selection = DRTConfig(include=settings.include, exclude=settings.exclude)
            dense = DynamicRank(model, selection, plan=Schedule.parse("dense@0").resolve(Run(1)))
            reference = estimate_run(dense, batch, **how, tick=tick)
            rows = [Layer(layer.name, layer.shape, layer.rows) for layer in reference.layers]
            proposal = propose(budget, plan, rows, reference.dense.flops, settings)
            if any(phase.kind != "dense" and phase.rank is None for phase in plan.phases):
                settings = replace(settings, rank=None, rank_ratio=proposal.rank_ratio)
            controller = DynamicRank(model, settings, plan=proposal.plan)
        return estimate_run(controller, batch, **how, tick=tick), settings, proposal


def _measured(
    config: PretrainedConfig, load: _Load, plan: Plan, settings: DRTConfig, steps: int
) -> tuple[PhaseTime, ...]:
    torch.manual_seed(0)
    model = load.model(config, meta=False)
    return measured(model, load.batch(model), plan, settings, steps, **load.arguments())
