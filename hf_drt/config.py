"""Every user parameter, once, with its unit and interval. Standard library only."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal, TypeGuard, get_args

from hf_drt.patterns import check_patterns, parse_rank_pattern
from hf_drt.registry import EXPORTERS, PRODUCTS
from hf_drt.schedule import PRESETS, Preset, Schedule

FrozenDtype = Literal["bfloat16", "int8"]
Start = Literal["auto", "scratch", "pretrained"]
AdapterInit = Literal["zero", "principal", "split"]
Moments = Literal["project", "reset"]
MatrixOptimizer = Literal["none", "muon"]
Recompute = Literal["none", "bottleneck"]
Truncation = Literal["weight", "activation"]
# Settings that may be left to a preset, and what they are in settled settings where it brings none.
_DEFINITE = {"matrix_optimizer": "none", "adapter_init": "zero", "moments": "reset"}


class _Help(Mapping[str, Any]):
    """Metadata of a field whose help, and whose choices, are those of a registry: made when they are asked for."""

    def __init__(self, text: Callable[[], str], members: Mapping[str, Any] | None):
        self._made: dict[str, Callable[[], Any]] = {"help": text}
        if members is not None:
            self._made["choices"] = lambda: list(members)

    def __getitem__(self, key: str) -> Any:
        made = self._made[key]()
        return made.replace("%", "%%") if key == "help" else made  # argparse fills in what follows a %

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def copy(self) -> dict[str, Any]:
        """As parsers ask for it, who take ``metadata`` for a dict."""
        return dict(self)


def _option(default: Any, help: str | Callable[[], str], members: Mapping[str, Any] | None = None) -> Any:
    return field(default=default, metadata={"help": help} if isinstance(help, str) else _Help(help, members))


def _schedule_help() -> str:
    presets = " ".join(f"{preset.call}: {preset.help}" for preset in PRESETS.values())
    return (
        "Phases of the run, e.g. 'factored@0 dense@40% adapter@80%', or a preset. A phase may say what it computes in, "
        "bf16 or fp32, as in factored/bf16@0. Boundaries are shares of the run "
        "(%), update steps (400), epochs (1.5ep), LR anchors (lr<0.9), or 'budget'. Unset: plain training, without any "
        f"change. Presets, with the defaults of their options: {presets}"
    )


def _budget_help() -> str:
    own = ", ".join(f"{preset.budget:g} in '{name}'" for name, preset in PRESETS.items() if preset.budget is not None)
    return (
        "Share of the dense training FLOPs of the selected layers that the run may take, in (0, 1]. It decides the "
        "rank of 'auto' (at most 1/4, whatever the budget), rank and boundary of 'auto_late', or just the boundary at "
        "'budget' of a schedule such as 'factored@0 dense@budget', and limits the windows of 'adaptive'. "
        "Unset: 0.9 where low rank means adapters; "
        f"else {own}, 0.3 elsewhere where the budget chooses the rank (in narrow models the least that a rank allows), "
        "and 0.4 where it does not."
    )


@dataclass(frozen=True)
class DRTConfig:
    """Settings of dynamic-rank training; each field's meaning, unit and interval is its ``help`` metadata.

    The same fields, prefixed with ``drt_``, are those of :class:`hf_drt.DRTTrainingArguments`.

    What a preset brings may depend on the model, on which a plan is resolved: :meth:`settled` has it.

    Raises:
        ValueError: A value is outside its interval; the message names the field, the value and the interval.
    """

    schedule: str | None = _option(None, _schedule_help)
    rank_ratio: float = _option(0.25, "Rank of low-rank layers as a share of min(out, in), in (0, 1].")
    rank: int | None = _option(None, "Absolute rank of low-rank layers, at least 1; takes the place of rank_ratio.")
    rank_pattern: dict[str, float] | str | None = _option(
        None,
        "JSON object from a regular expression on the layer's name to its rank: a whole number is an absolute rank, "
        "a number with a decimal point a share of min(out, in). The first match wins, e.g. '{\"attn\": 0.125}'.",
    )
    decomposition: str = _option(
        "svd",
        lambda: (
            f"Low-rank structure: {PRODUCTS.described()}. Layers that it does not suit, such as linear layers and "
            "1 x 1 convolutions where it is one of kernels, take 'svd'. The rank of a convolution, where it is a "
            "share, is one of its output channels."
        ),
        PRODUCTS,
    )
    truncation: Truncation = _option(
        "weight",
        "What a layer that loses rank at a switch, as from dense to factored, keeps: the most of its 'weight', or of "
        "its outputs on the inputs of the last update steps before ('activation'). Of convolutions in a decomposition "
        "of kernels, and of fused experts, always of the weight.",
    )
    rank_multiple: int = _option(8, "Ranks given as a share are rounded to a multiple of this, at least 1.")
    include: list[str] | None = _option(
        None, "Regular expressions; of the layers selected by the rule, keep those whose name matches one."
    )
    exclude: list[str] | None = _option(None, "Regular expressions; layers whose name matches one stay dense.")
    blocks: list[str] | None = _option(
        None,
        "What is a block, in place of what is found: names of classes, or regular expressions on the names of modules.",
    )
    ignore_source: list[str] | None = _option(
        None,
        "Regular expressions; layers whose name matches one are selected even if source code uses their weights beside "
        "calling them, or cannot be read. Right only if that code is never run, or is right for U V too.",
    )
    budget: float | None = _option(
        None,
        _budget_help,
    )
    dense_query_key: bool | None = _option(
        None,
        "Keep the query and key projections of attention dense in factored phases; rank_pattern comes first. "
        "Unset: what the preset brings ('auto' keeps none), else yes where the budget chooses the rank, as in the "
        "preset 'auto_late', and no elsewhere.",
    )
    group_by: list[str] | None = _option(
        None,
        "What stands together in the groups of a schedule that has full rank in turns, such as the preset rotate: "
        "'block' (neighbouring blocks), 'kind' (layers of a kind, as all query projections), or one regular expression "
        "per group. Unset: block.",
    )
    frozen_dtype: FrozenDtype | None = _option(
        None,
        "Type in which linear layers keep what is frozen of them, the weight in 'frozen' form and the base of an "
        "adapter: 'bfloat16', for 2 bytes a weight, or of bases alone 'int8', for one and a scale for each row (by "
        "torchao). Unset: as it is.",
    )
    dense_checkpointing: bool = _option(
        False,
        "Activation checkpointing in phases in which a target layer is dense and trained, turns of groups among them, "
        "and in no other: every block keeps its input, and repeats its forward pass in the backward pass.",
    )
    dense_accumulation: int = _option(
        1,
        "Pieces that each batch is divided into, by samples, for the forward and backward passes of phases in which a "
        "target layer is dense and trained, at least 1; gradients are those of the whole batch.",
    )
    recompute: Recompute = _option(
        "none",
        "What a block with factored layers repeats in the backward pass: 'none', or all but the products of each layer "
        "with V ('bottleneck'), so that it keeps its input and the layers' ranks of numbers per token.",
    )
    start: Start = _option(
        "auto",
        "What 'lowrank' in a schedule or preset stands for: factored form for a model from 'scratch', adapter form for "
        "a 'pretrained' one, whose weights a truncation would destroy. 'auto' looks where the weights come from, and "
        "refuses trained ones that do not come from from_pretrained.",
    )
    adapter_alpha: float | None = _option(
        None,
        "Numerator of the adapter's scaling alpha / rank, above 0. Unset: what the preset brings, as paper_conv does, "
        "else 16. Where adapter_init is 'split' nothing is scaled.",
    )
    adapter_init: AdapterInit | None = _option(
        None,
        "Start of the adapter: 'zero' (lora_B = 0), 'principal' (top singular directions of W), or 'split': as "
        "'principal', and from then on a change of rank divides the adapter and its base anew, with the same function "
        "and most of the optimizer's state. Unset: what the preset brings ('split' by 'drift'), else 'zero'.",
    )
    moments: Moments | None = _option(
        None,
        "Optimizer state of swapped layers: 'reset' drops it, 'project' carries the moments over by the chain rule "
        "(docs/optimizers.md says for which optimizers; the state of others starts anew in both). Unset: what the "
        "preset brings ('project' by 'drift'), else 'reset'.",
    )
    rewarmup_steps: int = _option(0, "Update steps of linear LR re-warm-up after every switch, at least 0 (off).")
    rewarmup_start: float = _option(0.1, "Share of the scheduled LR at which the re-warm-up starts, in [0, 1].")
    factored_lr_scale: float = _option(1.0, "Multiplier on the scheduled LR of factors U and V, above 0.")
    adapter_lr_scale: float = _option(1.0, "Multiplier on the scheduled LR of lora_A and lora_B, above 0.")
    left_lr_scale: float = _option(
        1.0,
        "Multiplier on the scheduled LR of the left factor alone, U or lora_B, above 0, on top of factored_lr_scale or "
        "adapter_lr_scale. LoRA+ (arXiv 2402.12354) trains lora_B at a higher rate than lora_A.",
    )
    right_lr_scale: float = _option(
        1.0, "Multiplier on the scheduled LR of the right factor alone, V or lora_A, above 0; as left_lr_scale."
    )
    matrix_optimizer: MatrixOptimizer | None = _option(
        None,
        "Optimizer of the selected layers' weights in every form, in place of the run's own: 'muon' moves dense "
        "weights as torch.optim.Muon does, and factors and adapters by a rule that bounds the change of their product "
        "alike; 'none' leaves them to the run's own. Unset: what the preset brings ('muon' by 'auto', where low rank "
        "means factors), else 'none'.",
    )
    matrix_lr: float = _option(
        0.04,
        "Peak learning rate of matrix_optimizer, above 0, for every form and rank; scheduled as the run's own. Times "
        "sqrt(max(1, out/in)) an update changes W by it in spectral norm; of factors by that at most, to first order.",
    )
    matrix_momentum: float = _option(
        0.9,
        "Momentum of matrix_optimizer, in [0, 1). The default was better than the 0.95 of torch.optim.Muon in a run of "
        "some 200 update steps; long runs are open.",
    )
    frobenius_decay: bool = _option(
        False,
        "Decay the product: apply the optimizer's weight_decay to factored layers as the gradient of "
        "1/2 ||U V||_F^2, decoupled, in place of L2 on each factor.",
    )
    log_rank_steps: int = _option(
        0, "Log the effective rank every so many update steps and at the end of every phase; 0 is off."
    )
    log_rank_per_layer: bool = _option(False, "Log the effective rank of every layer, not only mean and min.")
    evaluate_at_switch: bool = _option(
        False,
        "Evaluate at the end of every phase but the last (after eval_delay); with load_best_model_at_end save as well.",
    )
    save_at_switch: bool = _option(False, "Save a checkpoint at the end of every phase but the last.")
    export: str = _option(
        "dense", lambda: f"Form in which the Trainer saves and pushes the model: {EXPORTERS.described()}.", EXPORTERS
    )
    tag_phases: bool = _option(
        False, "Push the end of every phase to the Hub as a revision of its own, e.g. 'phase-1-dense'."
    )
    seed: int | None = _option(None, "Seed of new adapter directions, at least 0. Unset: the run's seed.")

    def __post_init__(self) -> None:
        self._check_choices()
        if self.schedule is not None:
            _require(isinstance(self.schedule, str) and self.schedule.strip(), self, "schedule", "a non-empty text")
        self._take_from_preset(self.parsed.preset if self.parsed is not None else None)
        if self.adapter_alpha is None:
            object.__setattr__(self, "adapter_alpha", 16.0)
        self._check_literals()
        self._check_ranks()
        self._check_rates()
        for name in ("include", "exclude", "blocks", "ignore_source"):
            check_patterns(name, getattr(self, name))
        self._check_groups()
        object.__setattr__(self, "rank_pattern", parse_rank_pattern(self.rank_pattern))

    def _check_groups(self) -> None:
        if isinstance(self.group_by, str):  # as one may write 'kind'
            object.__setattr__(self, "group_by", [self.group_by])
        check_patterns("group_by", self.group_by)
        _require(self.frozen_dtype in (None, *get_args(FrozenDtype)), self, "frozen_dtype", "bfloat16, int8, or unset")

    def _check_literals(self) -> None:
        for name, choices in (
            ("start", Start),
            ("adapter_init", AdapterInit),
            ("moments", Moments),
            ("matrix_optimizer", MatrixOptimizer),
            ("recompute", Recompute),
            ("truncation", Truncation),
        ):
            unset = name in _DEFINITE and getattr(self, name) is None
            allowed = get_args(choices)
            _require(unset or getattr(self, name) in allowed, self, name, f"one of {', '.join(allowed)}")

    def _check_choices(self) -> None:
        for name, default, registry in (("export", "dense", EXPORTERS), ("decomposition", "svd", PRODUCTS)):
            if getattr(self, name) != default:  # which is known without a look
                registry.find(getattr(self, name))
        for name in (
            "dense_checkpointing", "frobenius_decay", "log_rank_per_layer", "evaluate_at_switch", "save_at_switch",
            "tag_phases",
        ):  # fmt: skip
            _require(isinstance(getattr(self, name), bool), self, name, "True or False")
        _require(self.dense_query_key in (None, True, False), self, "dense_query_key", "True, False or None")

    def _check_ranks(self) -> None:
        hint = "It is a share of min(out, in); for an absolute rank use rank=."
        _require(_is_number(self.rank_ratio) and 0 < self.rank_ratio <= 1, self, "rank_ratio", "in (0, 1]", hint)
        for name in ("rank", "rank_multiple", "dense_accumulation"):
            value = getattr(self, name)
            if name != "rank" or value is not None:
                _require(_is_int(value) and value >= 1, self, name, "a whole number of at least 1")
        if self.budget is not None:
            hint = "It is a share of dense training FLOPs."
            _require(_is_number(self.budget) and 0 < self.budget <= 1, self, "budget", "in (0, 1]", hint)

    def _check_rates(self) -> None:
        scales = ("factored_lr_scale", "adapter_lr_scale", "left_lr_scale", "right_lr_scale")
        for name in ("adapter_alpha", *scales, "matrix_lr"):
            _require(_is_number(getattr(self, name)) and getattr(self, name) > 0, self, name, "a number above 0")
        _require(_is_number(self.rewarmup_start) and 0 <= self.rewarmup_start <= 1, self, "rewarmup_start", "in [0, 1]")
        momentum = self.matrix_momentum
        _require(_is_number(momentum) and 0 <= momentum < 1, self, "matrix_momentum", "in [0, 1)")
        for name in ("rewarmup_steps", "log_rank_steps"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 0, self, name, "a whole number of at least 0", "The unit is steps.")
        if self.seed is not None:
            _require(_is_int(self.seed) and self.seed >= 0, self, "seed", "a whole number of at least 0")

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy or pickle: the schedule is read anew there, since a preset's functions need not be picklable."""
        return {name: value for name, value in vars(self).items() if name != "parsed"}

    @cached_property
    def parsed(self) -> Schedule | None:
        """The schedule as it was read, once; None without one."""
        schedule = None if self.schedule is None else Schedule.parse(self.schedule)
        return schedule if schedule is None or self.lowrank is None else schedule.where(self.lowrank)

    @property
    def preset(self) -> Preset | None:
        """The preset that the schedule is; None where it is written phase by phase, or there is none."""
        return self.parsed.preset if self.parsed is not None else None

    def settled(self, lowrank: str | None) -> "DRTConfig":
        """The settings where it is known what 'lowrank' stands for: with those that the preset brings for it, and
        definite values of ``matrix_optimizer``, ``adapter_init`` and ``moments``. The schedule has the phases of that
        case alone.

        Args:
            lowrank: 'factored' or 'adapter'; None where no phase is in low rank, and nothing is brought.

        Raises:
            ValueError: The preset brings a value outside its interval.
        """
        if self.given is not None:
            return self if self.lowrank == lowrank else self.given.settled(lowrank)
        brought = self.preset.settings_for(self, lowrank) if self.preset is not None and lowrank is not None else {}
        unset = {name: value for name, value in brought.items() if getattr(self, name) is None}
        made = replace(self, **{name: getattr(self, name) or value for name, value in _DEFINITE.items()} | unset)
        vars(made).update(_lowrank=lowrank, _given=self, _brought=self.brought | frozenset(unset))
        vars(made).pop("parsed", None)  # which was read without it
        return made

    @property
    def lowrank(self) -> str | None:
        """What 'lowrank' stands for, 'factored' or 'adapter', in settled settings; else None."""
        return vars(self).get("_lowrank")

    @property
    def given(self) -> "DRTConfig | None":
        """What settled settings were made of; else None."""
        return vars(self).get("_given")

    @property
    def brought(self) -> frozenset[str]:
        """Names of the fields whose value the preset has brought."""
        return vars(self).get("_brought", frozenset())

    @property
    def uses_matrix_optimizer(self) -> bool:
        """Whether a matrix optimizer trains the selected layers' weights.

        Raises:
            RuntimeError: That depends on the model (:meth:`settled`).
        """
        if self.matrix_optimizer is None and self.preset is not None and "matrix_optimizer" in self.preset.settings:
            raise RuntimeError(
                f"whether the preset {self.preset.name} brings a matrix_optimizer depends on the model. Ask "
                "config.settled('factored') or config.settled('adapter')."
            )
        return self.matrix_optimizer not in (None, "none")

    @property
    def without_matrix_optimizer(self) -> str:
        """What a message that refuses ``matrix_optimizer`` adds where it is the preset that brings it: how to do
        without. Empty where the user has set it."""
        preset = self.preset
        if preset is None or "matrix_optimizer" not in self.brought or not self.uses_matrix_optimizer:
            return ""
        other = f", or schedule='{preset.instead}'" if preset.instead is not None else ""
        return (
            f" The preset {preset.name} brings matrix_optimizer={self.matrix_optimizer}: to do without, set "
            f"matrix_optimizer='none' (factors under the run's own optimizer){other}."
        )

    @property
    def leave_out(self) -> str:
        """What a message that refuses a setting proposes: what the preset has brought, none can leave out."""
        return "Do without it" if self.without_matrix_optimizer else "Leave the setting out"

    def _take_from_preset(self, preset: Preset | None) -> None:
        """Fill what is unset with the settings that go with the preset, whatever the model is.

        Raises:
            ValueError: It brings a value of a field that is never unset.
        """
        if preset is None:
            return
        open_to_it = [f.name for f in fields(self) if f.default is None and f.name != "schedule"]
        for name, value in preset.settings.items():
            if name not in open_to_it:
                raise ValueError(
                    f"preset '{preset.name}' brings {name}={value!r}, which would take the place of the user's own "
                    f"value. A preset may bring what can be left unset: {', '.join(open_to_it)}."
                )
        for name, value in preset.settings_for(self).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
                vars(self)["_brought"] = self.brought | {name}

    @property
    def patterns(self) -> dict[str, float]:
        """``rank_pattern`` as it was read; empty without one."""
        return self.rank_pattern if isinstance(self.rank_pattern, dict) else {}

    @property
    def init(self) -> AdapterInit:
        """``adapter_init``, or what it stands for where it is unset."""
        return self.adapter_init or "zero"

    def alpha_of(self, rank: int) -> float:
        """The numerator of an adapter's scaling alpha / rank; of one that is split, whose rank changes, the rank."""
        return float(rank if self.adapter_init == "split" else self.adapter_alpha or 0.0)

    @property
    def keeps_query_key(self) -> bool:
        """``dense_query_key``, or what it stands for where it is unset."""
        if self.dense_query_key is not None:
            return self.dense_query_key
        return self.budget_chooses_rank

    @property
    def selection(self) -> dict[str, list[str] | None]:
        """The settings that select layers, as :func:`hf_drt.find_targets` takes them."""
        return {name: getattr(self, name) for name in ("include", "exclude", "blocks", "ignore_source")}

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name, without the schedule; of settled settings also those
        that the preset brings by what 'lowrank' stands for."""
        default = DRTConfig(schedule=self.schedule)
        default = default if self.given is None else default.settled(None)
        names = (f.name for f in fields(self) if f.name != "schedule")
        return {name: getattr(self, name) for name in names if getattr(self, name) != getattr(default, name)}

    @property
    def budget_chooses_rank(self) -> bool:
        """Whether the schedule leaves a rank to the budget, as the presets ``auto`` and ``auto_late`` do."""
        return self.parsed is not None and self.parsed.budget_chooses_rank

    @classmethod
    def of(cls, value: "DRTConfig | str") -> "DRTConfig":
        """The configuration itself, or one with just a schedule's text.

        Raises:
            TypeError: ``value`` is neither.
        """
        if isinstance(value, str):
            return cls(schedule=value)
        if not isinstance(value, cls):
            raise TypeError(
                "drt settings must be a DRTConfig, or a schedule's text such as 'factored@0 dense@40% adapter@80%', "
                f"got {value!r}."
            )
        return value

    @classmethod
    def from_prefixed(cls, source: Any, prefix: str = "drt_", **override: Any) -> "DRTConfig":
        """The settings held by an object whose attributes are the fields' names with a prefix."""
        values = {f.name: getattr(source, prefix + f.name) for f in fields(cls) if hasattr(source, prefix + f.name)}
        return cls(**{**values, **override})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require(condition: Any, config: DRTConfig, name: str, allowed: str, hint: str = "") -> None:
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {getattr(config, name)!r}. {hint}".rstrip())
