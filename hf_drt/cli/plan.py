"""``hf-drt plan``: what a run will cost."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from transformers import PretrainedConfig, get_scheduler
from typer import Option

from hf_drt.cli.fit import PROBE, Fitted, fitted, largest_phase, parse_bytes, space_of
from hf_drt.cli.measurement import PhaseTime, measured
from hf_drt.cli.options import with_settings
from hf_drt.cli.output import print_json, progress
from hf_drt.cli.plan_tables import as_json, print_estimate, rows_of
from hf_drt.cli.processes import (
    ENGINE_HELP,
    LINKS_HELP,
    Wanted,
    check_settings,
    print_processes,
    processes_json,
    wanted,
)
from hf_drt.cli.source import build, guessed_task, has_weights, read_config
from hf_drt.config import DRTConfig
from hf_drt.controller import DynamicRank
from hf_drt.optim import maker
from hf_drt.planning import ResolvedPlan, resolved_plan, schedule_of
from hf_drt.precision import slow_dtype
from hf_drt.schedule import Run, Schedule, draw_timeline
from hf_drt.simulate import (
    BatchSpec,
    Candidate,
    Layer,
    OnProcesses,
    Proposal,
    RunEstimate,
    batch_spec,
    estimate_run,
    on_processes,
    propose,
)
from hf_drt.trainer import simulated_curve, unused

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WINDOWS = (
    "full-rank windows begin during the run, and are not in this plan; with them the target layers take at most {:g} "
    "of their dense FLOPs, and the peak may be that of dense training"
)
_GUESSED = "the configuration names no architecture, and is taken for one of {0}; --task says another"


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
        config: Any = model.config
        limit = getattr(config.get_text_config(decoder=False), "max_position_embeddings", None)
        default = min(512, limit) if isinstance(limit, int) and limit > 0 else 512
        return batch_spec(model, self.batch_size, self.seq_length or default)

    def step(self) -> dict[str, Any]:
        """How an update step is simulated."""
        autocast = torch.bfloat16 if self.bf16 else None
        return {"optimizer": self.optimizer, "accumulation": self.accumulation, "autocast": autocast}

    def __str__(self) -> str:
        length = f", {self.seq_length} tokens" if self.seq_length else ""
        checkpointing = ", activation checkpointing" if self.checkpointing else ""
        return f"batch {self.batch_size} x {self.accumulation}{length}, {self.optimizer}{checkpointing}"

    def arguments(self) -> dict[str, Any]:
        """Of a Trainer."""
        return {
            "per_device_train_batch_size": self.batch_size, "gradient_accumulation_steps": self.accumulation,
            "optim": self.optimizer, "bf16": self.bf16,
        }  # fmt: skip


# Fields of DRTConfig that change nothing of what is estimated.
_LEFT_OUT = {
    "adapter_alpha": "a factor in the adapter's forward pass costs the same at any value",
    "truncation": "inputs are gathered in ten update steps before a switch alone",
    "adapter_init": "the switch takes a moment longer, the steps cost the same",
    "moments": "the state of the optimizer has the same size, carried over or new",
    "rewarmup_steps": "the learning rate costs nothing",
    "rewarmup_start": "the learning rate costs nothing",
    "factored_lr_scale": "the learning rate costs nothing",
    "adapter_lr_scale": "the learning rate costs nothing",
    "left_lr_scale": "the learning rate costs nothing",
    "right_lr_scale": "the learning rate costs nothing",
    "matrix_lr": "the learning rate costs nothing",
    "matrix_momentum": "the momentum has the same size at any value",
    "frobenius_decay": "two products of r x r matrices in a step are not counted",
    "log_rank_steps": "logging is not in the estimate",
    "log_rank_per_layer": "logging is not in the estimate",
    "evaluate_at_switch": "evaluation is not in the estimate",
    "save_at_switch": "saving is not in the estimate",
    "export": "saving is not in the estimate",
    "tag_phases": "saving is not in the estimate",
    "seed": "no weight is made",
}
_ALSO = {
    "budget": "For other schedules a rank is proposed that keeps the whole run within this share of the whole model's "
    "dense training FLOPs.",
    "start": "Here 'auto' looks whether the folder holds weights.",
}


@with_settings(_LEFT_OUT, defaults={"schedule": "auto"}, also=_ALSO)
def plan(
    model: Annotated[str, typer.Argument(help="Folder of a model, its config.json, or a repository on the Hub.")],
    *,
    task: Annotated[
        str | None,
        Option(help="E.g. causal-lm; by default what the configuration says, and a causal LM where it says nothing."),
    ] = None,
    steps: Annotated[int, Option(min=1, help="Update steps of the run (max_steps).")] = 1000,
    steps_per_epoch: Annotated[int | None, Option(min=1, help="For boundaries in epochs.")] = None,
    lr_scheduler: Annotated[str, Option(help="lr_scheduler_type, for boundaries at an LR.")] = "linear",
    warmup_steps: Annotated[int, Option(min=0, help="For boundaries at an LR.")] = 0,
    batch_size: Annotated[int, Option(min=1, help="Samples per forward pass.")] = 8,
    seq_length: Annotated[int | None, Option(min=1, help="Tokens per sample; 512 or what the model takes.")] = None,
    accumulation: Annotated[
        int | None, Option(min=1, help="Forward passes per update step (default 1, or as --global-batch has it).")
    ] = None,
    optimizer: Annotated[str, Option(help="optim of the training arguments.")] = "adamw_torch_fused",
    dtype: Annotated[str, Option(help="Of the weights: float32 or bfloat16.")] = "float32",
    bf16: Annotated[bool, Option("--bf16", help="Mixed precision (autocast).")] = False,
    checkpointing: Annotated[bool, Option("--checkpointing", help="Activation checkpointing.")] = False,
    max_memory: Annotated[
        str | None,
        Option(
            help="Propose a plan whose tensors fit into this, e.g. 24GiB: dense training, or the schedule given if "
            "it is not 'auto'; with activation checkpointing; full rank in turns (rotate)."
        ),
    ] = None,
    processes: Annotated[
        int | None, Option(help="Predict memory, bytes sent and switches on so many processes; batches are of each.")
    ] = None,
    engine: Annotated[str | None, Option(help=ENGINE_HELP)] = None,
    shards: Annotated[int | None, Option(help="Of hsdp: processes that have one copy between them.")] = None,
    links: Annotated[str | None, Option(help=LINKS_HELP)] = None,
    global_batch: Annotated[
        int | None, Option(help="Samples per update step of all processes; gives --accumulation.")
    ] = None,
    layers: Annotated[bool, Option("--layers", help="A table of all target layers too.")] = False,
    measure: Annotated[bool, Option("--measure", help="Time real steps here, and predict the run's length.")] = False,
    measure_steps: Annotated[int, Option(min=2, help="Steps per phase to time; the first is left out.")] = 5,
    picture: Annotated[Path | None, Option(help="Write the timeline as a picture (extra 'report').")] = None,
    json: Annotated[bool, Option("--json", help="JSON in place of tables.")] = False,
    **settings: Any,
) -> None:
    """What a run will cost: FLOPs, parameters and memory of every phase, without weights."""
    if dtype not in _DTYPES:
        raise typer.BadParameter(f"must be one of {', '.join(_DTYPES)}, got '{dtype}'.", param_hint="--dtype")
    try:
        maker(optimizer)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--optimizer") from None
    many = wanted(
        processes, engine, shards, links, global_batch,
        batch_size=batch_size, accumulation=accumulation, dtype=dtype, bf16=bf16, max_memory=max_memory,
    )  # fmt: skip
    accumulation = many.accumulation if many is not None else accumulation or 1
    source = read_config(model)
    origin = settings["start"] if settings["start"] != "auto" else "pretrained" if has_weights(model) else "scratch"
    run = Run(steps, steps_per_epoch, _lr_curve(lr_scheduler, warmup_steps, steps))
    guess = guessed_task(source) if task is None else None
    load = _Load(batch_size, seq_length, accumulation, optimizer, _DTYPES[dtype], bf16, checkpointing, task or guess)
    fit = None if max_memory is None else _fitted(_limit(max_memory), settings, origin, load, source, run)
    if fit is not None:
        load = replace(load, checkpointing=fit.found.checkpointing)
    bare = load.model(source, meta=True)
    config = _parsed(settings, origin) if fit is None else _config_of(fit.found, settings, origin, bare)
    found = _estimated(bare, load, _resolved(config, run, bare), settings["budget"])
    scaled = None if many is None else _on_processes(source, load, found, many)
    times = _measured(source, load, found.resolved, measure_steps) if measure else None
    estimate = found.estimate
    if guess is not None:
        estimate = replace(estimate, warnings=(_GUESSED.format(guess), *estimate.warnings))
    if json:
        fits = {} if fit is None else {"fitting": fit.as_json()}
        fits |= {} if scaled is None else {"processes": processes_json(scaled, load.accumulation)}
        print_json(as_json(estimate, found.resolved, found.proposal, times) | fits)
    else:
        if fit is not None:
            fit.print()
        print_estimate(f"{model}, {origin}; {load}", estimate, found.resolved, found.proposal, times, layers)
        if scaled is not None:
            print_processes(scaled, [phase.steps for phase in estimate.phases])
    if picture is not None:
        if not draw_timeline(rows_of(estimate, found.resolved.plan), picture):
            raise ValueError("the picture needs matplotlib: pip install 'hf-drt[report]'.")
        typer.echo(f"{picture} written", err=True)


def _limit(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--max-memory") from None


def _fitted(
    limit: int, settings: dict[str, Any], origin: str, load: _Load, source: PretrainedConfig, run: Run
) -> Fitted:
    if settings["budget"] is not None:
        raise typer.BadParameter("a budget and a memory both propose a rank. Give one of them.", param_hint="--budget")

    def peak(candidate: Candidate) -> int:
        model = replace(load, checkpointing=candidate.checkpointing).model(source, meta=True)
        plan = _resolved(_config_of(candidate, settings, origin, model), run, model)
        return largest_phase(str(candidate), plan, model, load.batch(model), load.step(), limit)

    model = load.model(source, meta=True)
    config = _parsed(settings | PROBE, origin)
    ratio = settings["rank_ratio"] if settings["rank_ratio"] != DRTConfig().rank_ratio else None
    space = space_of(model, config, {name for name, _ in unused(model, config)}, ratio)
    asked = settings["schedule"] if settings["schedule"] != "auto" else "dense@0"
    return fitted(limit, Candidate({"schedule": asked}, load.checkpointing), space, peak)


def _config_of(candidate: Candidate, settings: dict[str, Any], origin: str, model: nn.Module) -> DRTConfig:
    """The settings with a candidate's; those for other forms than it has are left out, if its schedule is not the
    user's own."""
    config = _parsed(settings | candidate.settings, origin)
    if candidate.settings["schedule"] == settings["schedule"]:
        return config
    return replace(config, **{name: DRTConfig.__dataclass_fields__[name].default for name, _ in unused(model, config)})


def _parsed(values: dict[str, Any], origin: str) -> DRTConfig:
    """The settings; what is wrong with them is a wrong command line. A budget that the schedule does not use is one to
    propose a rank by."""
    try:
        given: dict[str, Any] = {name: value if value != [] else None for name, value in values.items()}
        schedule = schedule_of(DRTConfig(schedule=given["schedule"]))
        if schedule.writes_lowrank:
            given["start"] = origin
        if not schedule.uses_budget:
            given["budget"] = None
        return DRTConfig(**given)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="the plan") from None


def _resolved(config: DRTConfig, run: Run, model: nn.Module) -> ResolvedPlan:
    """The phases; what does not fit the run is a wrong command line too. The model is looked through here alone."""
    try:
        return resolved_plan(config, run, model)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="the plan") from None


def _lr_curve(name: str, warmup: int, steps: int) -> Any:
    def make(optimizer: torch.optim.Optimizer) -> Any:
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)

    return simulated_curve(make, 1.0, steps)


@dataclass(frozen=True)
class _Found:
    """The plan asked for, or what is proposed in its place, and its estimate."""

    estimate: RunEstimate
    resolved: ResolvedPlan
    proposal: Proposal | None = None


def _estimated(model: nn.Module, load: _Load, resolved: ResolvedPlan, budget: float | None) -> _Found:
    batch = load.batch(model)
    how = load.step()
    controller, proposal = DynamicRank(model, resolved.config, plan=resolved, in_trainer=True), None
    with progress("counting", len(resolved.plan) + 1) as tick:
        if budget is not None and not schedule_of(resolved.config).uses_budget:
            chosen: dict[str, Any] = {**resolved.config.selection}
            selection = DRTConfig(**chosen)
            by_hand = resolved.with_config(selection, Schedule.parse("dense@0").resolve(Run(1)))
            reference = estimate_run(DynamicRank(model, selection, plan=by_hand), batch, **how, tick=tick)
            rows = [Layer(layer.name, layer.shape, layer.rows) for layer in reference.layers]
            proposal = propose(budget, resolved.plan, rows, reference.dense.flops, resolved.config)
            config = resolved.config
            if any(phase.kind != "dense" and phase.rank is None for phase in resolved.plan.phases):
                config = replace(config, rank=None, rank_ratio=proposal.rank_ratio)
            resolved = resolved.with_config(config, proposal.plan)
            controller = DynamicRank(model, config, plan=resolved, in_trainer=True)
        estimate = estimate_run(controller, batch, **how, tick=tick)
    if resolved.trigger is not None:
        estimate = replace(estimate, warnings=(*estimate.warnings, _WINDOWS.format(resolved.budget)))
    here = "cuda" if torch.cuda.is_available() else "cpu"
    if slow := slow_dtype([phase.dtype for phase in resolved.plan.phases], here):
        estimate = replace(estimate, warnings=(*estimate.warnings, slow))
    return _Found(estimate, resolved, proposal)


def _on_processes(source: PretrainedConfig, load: _Load, found: _Found, many: Wanted) -> OnProcesses:
    """The plan on many processes. An engine that rounds weights to bfloat16 before a layer computes, as all do but DDP,
    leaves none to autocast: its activations are those of a model in bfloat16."""
    check_settings(many, found.resolved.config)
    config, plan = found.resolved.config, found.resolved
    run = found.estimate
    if load.bf16 and not many.layout.whole_state:
        half = replace(load, dtype=torch.bfloat16, bf16=False)
        model = half.model(source, meta=True)
        controller = DynamicRank(model, config, plan=plan, in_trainer=True)
        with progress("counting in bfloat16", len(plan.plan) + 1) as tick:
            run = estimate_run(controller, half.batch(model), **half.step(), tick=tick)
    model = load.model(source, meta=True)
    return on_processes(
        DynamicRank(model, config, plan=plan, in_trainer=True), [phase.step for phase in run.phases], run.dense,
        many.layout, many.machine, optimizer=load.optimizer, accumulation=load.accumulation,
        dtype="bfloat16" if load.bf16 or load.dtype == torch.bfloat16 else "float32",
    )  # fmt: skip


def _measured(source: PretrainedConfig, load: _Load, resolved: ResolvedPlan, steps: int) -> tuple[PhaseTime, ...]:
    torch.manual_seed(0)
    model = load.model(source, meta=False)  # another model, with weights, whose trainer looks through it
    return measured(model, load.batch(model), resolved.plan, resolved.config, steps, **load.arguments())
