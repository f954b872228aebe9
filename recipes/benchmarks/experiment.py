"""One run of one method on one task, and its record."""

import contextlib
import platform
import resource
import statistics
import time
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from extras import Guide, Project, profiled_ranks
from tasks import build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback, set_seed
from widened import Widened

from hf_drt import DRTConfig, DRTTrainer, DRTTrainingArguments, effective_weight, find_targets
from hf_drt.forms.modules import FactoredLinear
from hf_drt.linalg.spectral import effective_rank, factored_singular_values, singular_values
from hf_drt.planning.idle_settings import settings_given
from hf_drt.precision import has_bf16_products
from hf_drt.trainer.memory import read_peak, reset_peak
from hf_drt.trainer.refusals import unused

CPU = torch.device("cpu")
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1_000_000}


@dataclass(frozen=True)
class Settings:
    """All that decides a run's outcome; its JSON is the identity of the run.

    Attributes:
        task: Name of the task file.
        kind: Kind of the task (:mod:`tasks`).
        model, data: Sections of the task file, the model's with the method's changes.
        training: Training arguments, ``drt_*`` ones among them, with the method's changes; ``matrix_rate`` is the
            learning rate of the target layers' weights.
        peft: Arguments of PEFT's LoraConfig; None for no PEFT.
        seed: Of initialisation, order of the data, dropout.
        measure: ``points``: how often the run is evaluated, and effective ranks are taken; ``after_switch``: whether it
            is too after the first update step of every later phase; of a pilot also ``turn``, the steps of a turn.
        extras: What a method has beside (:mod:`extras`).
    """

    task: str
    kind: str
    model: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    peft: dict[str, Any] | None
    seed: int
    measure: dict[str, Any]
    extras: dict[str, Any] = field(default_factory=dict)


class Watch(TrainerCallback):
    """Time, FLOPs, memory and ranks of a run. Its clocks stand still in evaluations and in its own measurements.

    Times are of whole update steps, the change of form at their beginning included: wall-clock seconds, and the seconds
    that the process has computed, which other work on the machine hardly changes.
    """

    def __init__(self, names: list[str], points: int, metric: str, turn: int | None = None, after: bool = False):
        self.names, self.points, self.metric, self.turn, self.after = names, points, metric, turn, after
        self.wall = self.cpu = self.flops = 0.0
        self.gradients = 0
        self.phases: list[dict[str, Any]] = []
        self.curve: list[dict[str, float]] = []
        self.trainer: DRTTrainer | None = None
        self._form: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter(), time.process_time()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradients = tensor_bytes([p.grad for p in self.trainer.model.parameters()])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wall, cpu = time.perf_counter() - self._begun[0], time.process_time() - self._begun[1]
        self.wall, self.cpu = self.wall + wall, self.cpu + cpu
        self._count_phase(state.global_step, wall, cpu)
        self.flops += self.phases[-1]["flops_per_step"]
        due = {round(state.max_steps * (i + 1) / self.points) for i in range(self.points)}
        if self.after and self.trainer.drt is not None:
            due |= {phase.start + 1 for phase in self.trainer.drt.plan.phases[1:]}
        control.should_evaluate = state.global_step in due

    def _count_phase(self, step: int, wall: float, cpu: float) -> None:
        model = self.trainer.model
        drt = self.trainer.drt
        form = drt.phase if drt is not None else 0
        if form != self._form:
            self._form = form
            kind = drt.plan.phases[form].kind if drt is not None else "dense"
            flops = step_flops(self.trainer)
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            self.phases.append(
                {"kind": kind, "start": step - 1, "steps": 0, "seconds": 0.0, "cpu_seconds": 0.0, "first_seconds": wall,
                 "flops_per_step": flops, "trainable": trainable, "peak_mib": 0.0, **self._bytes()}
            )  # fmt: skip
            self._times, self._warm = [], []
            reset_peak(CPU)
        phase = self.phases[-1]
        phase["steps"] += 1
        self._times.append(cpu)
        self._warm += [cpu] if self._is_warm(step, phase) else []
        phase["step_seconds"] = statistics.fmean(self._warm or self._times)
        phase["seconds"] += wall
        phase["cpu_seconds"] += cpu
        phase["peak_mib"] = max(phase["peak_mib"], read_peak(CPU) or 0.0)

    def _is_warm(self, step: int, phase: dict[str, Any]) -> bool:
        """Whether a step is like most: the first one of a phase makes the optimizer's state, and that of a turn finds
        the processor's caches filled by others."""
        return phase["steps"] > 1 and (self.turn is None or (step - 1) % self.turn > 0)

    def _bytes(self) -> dict[str, int]:
        """What the tensors of the phase take, exactly; the optimizer's state is there after its first step."""
        trainer = self.trainer
        return {
            "parameter_bytes": tensor_bytes(list(trainer.model.parameters())),
            "gradient_bytes": self.gradients,
            "optimizer_bytes": tensor_bytes(list(trainer.optimizer.state.values())),
        }

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        spectra = ranks(self.trainer.model, self.names)
        self.curve.append(
            {"step": state.global_step, "seconds": self.wall, "cpu_seconds": self.cpu, "flops": self.flops,
             "value": metrics[self.metric], "loss": metrics["eval_loss"], "effective_rank": mean(spectra),
             "layers": spectra, "accuracy": metrics.get("eval_accuracy")}
        )  # fmt: skip
        reset_peak(CPU)


def used(training: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Training arguments without the ``drt_*`` settings that are common to a task's methods, and idle in this one."""
    config = DRTConfig(**{name[4:]: value for name, value in training.items() if name.startswith("drt_")})
    idle = settings_given(config) if config.schedule is None else [name for name, _ in unused(model, config)]
    return {name: value for name, value in training.items() if name not in {f"drt_{setting}" for setting in idle}}


def run(settings: Settings, cache: Path, folder: str, turns: TrainerCallback | None = None) -> dict[str, Any]:
    """Train, and return the record: the metric at the end and along the way, time, FLOPs, memory, ranks.

    Args:
        settings: Of the run.
        cache: Folder of data and tokenizers.
        folder: Of the Trainer's output.
        turns: Of a pilot (:mod:`pilot`).
    """
    task = build(settings.kind, settings.model, settings.data, cache)
    set_seed(settings.seed)
    model = task.model()
    names = list(find_targets(model).targets)
    if settings.peft is not None:
        model = with_lora(model, names, settings.peft)
    metric = "eval_accuracy" if settings.kind.endswith("classifier") else "eval_loss"
    watch = Watch(
        names,
        settings.measure["points"],
        metric,
        settings.measure.get("turn"),
        settings.measure.get("after_switch", False),
    )
    training = {**QUIET, **used(settings.training, model)}
    matrix_rate = training.pop("matrix_rate", None)
    projected = str(training.get("optim", "")).startswith(("galore", "apollo"))
    if projected:
        training.setdefault("optim_target_modules", names)
    training |= {"output_dir": folder, "seed": settings.seed}
    callbacks = [watch] if turns is None else [turns, watch]
    data = {"train_dataset": task.train, "data_collator": task.collate}
    rate = training.get("drt_matrix_lr", DRTConfig().matrix_lr)
    if profile := settings.extras.get("profile"):
        training["drt_rank_pattern"] = profiled_ranks(deepcopy(model), names, data, training, rate, profile)
        training.pop("drt_rank_ratio", None)  # which has no layer left
        set_seed(settings.seed)
    if guide := settings.extras.get("guide"):
        callbacks.append(Guide(model, names, guide["share"], rate))
    trainer = DRTTrainer(
        model=model,
        args=DRTTrainingArguments(**training),
        eval_dataset=task.evaluation,
        compute_metrics=task.metrics,
        preprocess_logits_for_metrics=task.predict,
        callbacks=callbacks,
        **data,
    )
    if project := settings.extras.get("project"):
        trainer.add_callback(Project(model, names, project))
    watch.trainer = trainer
    start = mean(ranks(model, names))
    if projected:
        with_adam_settings(trainer)
    if matrix_rate is not None:
        with_matrix_rate(trainer, names, matrix_rate)
    before = read_peak(CPU)
    emulated = bool(settings.extras.get("widened")) and not has_bf16_products()
    with Widened() if emulated else contextlib.nullcontext():
        trainer.train()
    return {
        "value": watch.curve[-1]["value"],
        "probe": task.probe(trainer.model) if task.probe is not None and settings.measure["points"] > 1 else {},
        "seconds": watch.wall,
        "cpu_seconds": watch.cpu,
        "flops": watch.flops,
        "steps": trainer.state.global_step,
        "start_rank": start,
        "phases": watch.phases,
        "curve": watch.curve,
        "switches": [row for row in trainer.state.log_history if "drt_switch_seconds" in row],
        "baseline_mib": before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "environment": environment(),
        **({"emulated": True} if emulated else {}),
    }


def with_lora(model: nn.Module, names: list[str], options: dict[str, Any]) -> nn.Module:
    """The model under PEFT's LoRA on the layers that hf_drt would train; a new head is trained along."""
    from peft import LoraConfig, get_peft_model

    # PEFT appends to the lists it is given, and these stand in the record.
    return get_peft_model(model, LoraConfig(target_modules=names, **deepcopy(options)))


def with_adam_settings(trainer: DRTTrainer) -> None:
    """Give GaLore or APOLLO the betas, epsilon and weight decay of the run, which transformers does not pass to all
    weights."""
    args, optimizer = trainer.args, trainer.create_optimizer()
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    ids = {id(p) for name, p in trainer.model.named_parameters() if name in decayed}
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    groups = []
    for group in optimizer.param_groups:
        for inside, decay in ((True, args.weight_decay), (False, 0.0)):
            params = [p for p in group["params"] if (id(p) in ids) is inside]
            groups += [{**group, **adam, "weight_decay": decay, "params": params}] if params else []
    optimizer.param_groups[:] = groups


def with_matrix_rate(trainer: DRTTrainer, names: list[str], rate: float) -> None:
    """Give the weights of the target layers a learning rate of their own, in whatever form they will be."""
    optimizer = trainer.create_optimizer()
    matrices = {id(trainer.model.get_submodule(name).weight) for name in names}
    for group in list(optimizer.param_groups):
        own = [p for p in group["params"] if id(p) in matrices]
        if own:
            group["params"] = [p for p in group["params"] if id(p) not in matrices]
            optimizer.param_groups.append({**group, "params": own, "lr": rate})


def tensor_bytes(values: list[Any]) -> int:
    """Bytes of all tensors in nested dicts and lists, and in plain objects such as GaLore's projectors."""
    total = 0
    for value in values:
        match value:
            case torch.Tensor():
                total += value.nbytes
            case dict():
                total += tensor_bytes(list(value.values()))
            case list() | tuple():
                total += tensor_bytes(list(value))
            case _ if hasattr(value, "__dict__"):
                total += tensor_bytes(list(vars(value).values()))
    return total


def mean(values: dict[str, float]) -> float | None:
    """Mean, or None of nothing."""
    return sum(values.values()) / len(values) if values else None


def step_flops(trainer: DRTTrainer) -> float:
    """FLOPs of forward and backward of one update step, counted on a batch; gradients and generators stay."""
    model, size = trainer.model, trainer.args.per_device_train_batch_size
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(size)]))
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng([]), FlopCounterMode(display=False) as counter:
        torch.autograd.grad(model(**batch).loss, trained, allow_unused=True)
    return float(counter.get_total_flops() * trainer.args.gradient_accumulation_steps)


def ranks(model: nn.Module, names: list[str]) -> dict[str, float]:
    """Effective rank of the target layers' weights, kernels as matrices, also where PEFT has wrapped them."""
    found = {}
    for name in names:
        module = _layer(model, name)
        if type(module) is FactoredLinear:
            spectrum = factored_singular_values(module.U, module.V)
        elif hasattr(module, "get_delta_weight"):
            spectrum = singular_values(module.base_layer.weight + module.get_delta_weight("default"))
        else:
            spectrum = singular_values(effective_weight(module))
        found[name] = effective_rank(spectrum)
    return found


def _layer(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(f"base_model.model.{name}")


def environment() -> dict[str, Any]:
    """Versions and machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate", "hf-drt")},
        "machine": f"{platform.machine()}, {_processor()}",
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
