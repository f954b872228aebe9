"""Which layers are trained in changing rank: linear layers and convolutions of blocks; and why each other is not."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from hf_drt.engines import engine_of
from hf_drt.forms import Dense, FormedLinear, LowRankLinear, form_of, odd_tensors, own_behaviour
from hf_drt.targets.attention import attention_split
from hf_drt.targets.blocks import block_roots, conv_inside, is_linear, linear_inside
from hf_drt.targets.convolutions import conv_unfit, has_conv_form, is_convolution
from hf_drt.targets.experts import FUSED, as_layer, fused_weights, unfit_experts
from hf_drt.targets.holders import held_elsewhere
from hf_drt.targets.source_reading import Reading, readings

logger = logging.getLogger(__name__)

_ROUTER_LEAF = re.compile(r"router|gate|gating|classifier_router|switch", re.IGNORECASE)
_EXPERT_COUNT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Modules of torch.nn that do nothing with a layer but call it; others, as nn.MultiheadAttention, take its weight.
_CALLERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# Reasons by source code, which ignore_source overrides.
_READ, _WRITTEN = "weight read by its owner", "weight written by the model"
_HIDDEN = "source of its owner cannot be read"


@dataclass(frozen=True)
class Selection:
    """Linear layers and convolutions by name: those that change form, and those that stay dense with the reason.

    ``targets`` are in the order of ``model.named_modules()``. Fused experts are a layer for each of their weights.
    ``fused_share`` is the share of the model's parameters in fused experts that cannot change form; ``notes`` are
    warnings about what source code hides, or says and was overridden.
    """

    targets: dict[str, nn.Module]
    skipped: dict[str, str]
    fused_share: float = 0.0
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """The skipped layers, counted by reason."""
        counts = Counter(self.skipped.values())
        text = "; ".join(f"{count} {reason}" for reason, count in counts.most_common()) or "no linear layer at all"
        return f"{text} ({self.fused_note()})" if self.fused_share else text

    def fused_note(self) -> str | None:
        """What is to be said of fused experts that cannot change form; None if there are none."""
        if not self.fused_share:
            return None
        names = [name for name, reason in self.skipped.items() if reason.startswith(FUSED)]
        return (
            f"{self.fused_share:.1%} of the model's parameters stay dense: {len(names)} weights of fused experts, e.g. "
            f"{names[0]} ({self.skipped[names[0]]})"
        )

    def warnings(self) -> tuple[str, ...]:
        """What is to be warned of: fused experts, and what the notes say."""
        return tuple(filter(None, (self.fused_note(), *self.notes)))

    def log_notes(self) -> None:
        """Put the warnings into the log."""
        for note in self.warnings():
            logger.warning("%s.", note)


def find_targets(
    model: nn.Module,
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    blocks: list[str] | None = None,
    ignore_source: list[str] | None = None,
) -> Selection:
    """The linear layers, convolutions and fused experts inside blocks, narrowed by patterns on their names.

    An ``nn.MultiheadAttention`` counts as the layers that :func:`hf_drt.split_attention` makes of it.

    Blocks are found as :func:`hf_drt.targets.blocks.block_roots` says, those of convolutions by
    :func:`hf_drt.targets.blocks.conv_inside`. Where there is neither, as in a plain MLP, all linear layers but the last
    count.

    Args:
        model: Any module.
        include: Regular expressions (``re.search``); a layer has to match one of them.
        exclude: Regular expressions; a layer must match none.
        blocks: What is a block, in place of what is found: names of classes, or regular expressions on the names of
            modules.
        ignore_source: Regular expressions; layers that match one are selected even if the source code of a class uses
            their weights, or cannot be read.

    Raises:
        ValueError: PEFT has changed layers of the model; no layer is left (the message counts what was found, by
            reason); an entry of ``blocks`` names nothing, or one of ``ignore_source`` changes nothing.
    """
    with engine_of(model).readable(), attention_split(model):
        return _found(model, include, exclude, blocks, ignore_source)


def _found(
    model: nn.Module,
    include: list[str] | None,
    exclude: list[str] | None,
    blocks: list[str] | None,
    ignore_source: list[str] | None,
) -> Selection:
    _refuse_peft(model)
    around = _Surroundings.of(model, blocks)
    targets, skipped, ignored, fused = {}, {}, {}, 0
    for name, module, weight in _layers(model):
        said = _source_reason(name, weight, around)
        overrides = said is not None and _matches(name, ignore_source)
        reason = _reason(name, module, weight, around)
        if reason is None and said is not None and not overrides:
            reason = said[0] if said[0] == _WRITTEN or not isinstance(module, LowRankLinear) else None
        reason = reason or _pattern_reason(name, include, exclude)
        if reason is None:
            targets[name] = module if weight is None else as_layer(module, weight)
            ignored |= {name: said[1]} if said is not None and overrides else {}
            continue
        skipped[name] = reason
        fused += weight.numel() if weight is not None and reason.startswith(FUSED) else 0
    fused_share = fused / sum(p.numel() for p in model.parameters()) if fused else 0.0
    selection = Selection(targets, skipped, fused_share, tuple(_notes(skipped, ignored, around)))
    if not targets:
        raise ValueError(
            f"no layer to train in changing rank: {type(model).__name__} has {around.blocks} transformer blocks, "
            f"and its linear layers are left out as follows: {selection.summary()}. include={include}, "
            f"exclude={exclude}; patterns are regular expressions on names such as those of model.named_modules(). "
            "What is a block can be said by blocks (names of classes, or such patterns); what source code keeps dense "
            "is overridden by ignore_source."
        )
    _refuse_idle_overrides(ignore_source, ignored, skipped)
    _warn_of_idle_patterns("include", include, [*targets, *skipped])
    _warn_of_idle_patterns("exclude", exclude, [*targets, *skipped])
    return selection


def _refuse_peft(model: nn.Module) -> None:
    """A layer of PEFT's keeps matrices of its own beside the original one, which would change form instead of W."""
    for name, module in model.named_modules():
        if any(cls.__module__.startswith("peft.") for cls in type(module).__mro__):
            raise ValueError(
                "hf_drt does not support a PEFT model, which has changed the layers already: "
                f"{name or 'the model'} is a {type(module).__name__} of PEFT. Use the original model, or merge first: "
                "model = model.merge_and_unload(), which PEFT leaves frozen, and model.requires_grad_(True)."
            )


@dataclass(frozen=True)
class _Surroundings:
    """What a layer's fitness depends on outside of the layer itself; sets of ints hold ids, but for ``experts``."""

    blocks: int
    inside: set[int]
    inside_conv: set[int]
    heads: set[int]
    shared: set[int]
    unregistered: set[int]
    """Modules that an owner holds a second time, in a plain list, tuple, dict or attribute."""
    parents: dict[str, nn.Module]
    experts: set[int]
    """Numbers of experts that configurations tell, by which routers are known."""
    beside_experts: set[int]
    """Modules that have experts among their children."""
    readings: dict[int, Reading]
    written: set[str]
    unread: set[str]
    """Functions without source code of classes that own no layer, and might write to the layers of others."""

    @classmethod
    def of(cls, model: nn.Module, entries: list[str] | None) -> "_Surroundings":
        blocks = block_roots(model, entries)
        inside_conv = conv_inside(model, blocks) if entries is None else set()
        inside = linear_inside(model, blocks, repeats=bool(inside_conv) or entries is not None)
        found = readings(model)
        owns = {id(m) for m in model.modules() if any(is_linear(c) or is_convolution(c) for c in m.children())}
        return cls(
            blocks=len(blocks),
            inside=inside,
            inside_conv=inside_conv if entries is None else inside,
            heads={id(head) for head in _output_embeddings(model)},
            shared=_shared_parameters(model),
            unregistered=held_elsewhere(model),
            parents=_parents(model),
            experts=_expert_counts(model),
            beside_experts={id(m) for m in model.modules() if any("expert" in name for name, _ in m.named_children())},
            readings=found,
            written=set().union(*(each.written for each in found.values())),
            unread={function for key, each in found.items() for function in each.unread if key not in owns},
        )


def _reason(name: str, module: nn.Module, weight: nn.Parameter | None, around: _Surroundings) -> str | None:
    """Why a layer has to stay dense, or None. ``weight`` is that of fused experts, else None."""
    if id(module) not in (around.inside_conv if is_convolution(module) else around.inside):
        return "outside of the blocks"
    if id(module) in around.heads:
        return "output embeddings"
    held = module._parameters.get("weight") if weight is None else weight
    if id(module) in around.unregistered or id(held) in around.unregistered:
        return "held outside of the module tree"
    if weight is not None:
        tied = "tied or shared weight" if id(weight) in around.shared else None
        reason = tied or unfit_experts(module, name.rpartition(".")[2], weight)
        reason = reason or own_behaviour(as_layer(module, weight))
    else:
        reason = conv_unfit(name, module) if is_convolution(module) else None
        reason = reason or _unfit(name, module, around)
    return reason


def _source_reason(name: str, weight: nn.Parameter | None, around: _Surroundings) -> tuple[str, str] | None:
    """Why a layer has to stay dense by what source code says or hides, and where that stands; or None."""
    owner, leaf = around.parents.get(name), name.rpartition(".")[2]
    if written := [path for path in around.written if f".{name}".endswith(f".{path}")]:
        return _WRITTEN, f"the model writes to the weight of {written[0]}"
    if owner is None or weight is not None:
        return None
    found = around.readings[id(owner)]
    if leaf in found.readers:
        return _READ, f"{found.readers[leaf]} reads its weight"
    if found.unread:
        return _HIDDEN, f"the source code of {found.unread[0]} cannot be read"
    return None


def _notes(skipped: dict[str, str], ignored: dict[str, str], around: _Surroundings) -> Iterator[str]:
    """What is to be said of source code that was overridden, or that could not be read."""
    for said in dict.fromkeys(ignored.values()):
        names = [name for name, other in ignored.items() if other == said]
        yield f"ignore_source: {', '.join(names)} will change form, although {said}"
    if hidden := [name for name, reason in skipped.items() if reason == _HIDDEN]:
        yield f"{', '.join(hidden)} will stay dense, since the source code of the modules that hold them cannot be read"
    if around.unread:
        functions = ", ".join(sorted(around.unread))
        yield f"the source code of {functions} cannot be read; it must not write to the weights of layers"


def _refuse_idle_overrides(patterns: list[str] | None, ignored: dict[str, str], skipped: dict[str, str]) -> None:
    for pattern in patterns or ():
        if not any(re.search(pattern, name) for name in ignored):
            open_to_it = [name for name, reason in skipped.items() if reason in (_READ, _WRITTEN, _HIDDEN)]
            raise ValueError(
                f"ignore_source: {pattern!r} overrides nothing, since no layer whose name it matches would stay dense "
                f"for what source code does. Layers that do: {', '.join(open_to_it) or 'no other'}. Leave it out."
            )


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter | None]]:
    """Name and module of every linear layer and convolution; name, experts module and parameter of every weight of
    fused experts."""
    for name, module in model.named_modules():
        if is_linear(module) or is_convolution(module):
            yield name, module, None
            continue
        for leaf, weight in fused_weights(module):
            yield f"{name}.{leaf}" if name else leaf, module, weight


def _warn_of_idle_patterns(option: str, patterns: list[str] | None, names: list[str]) -> None:
    for pattern in patterns or ():
        if not any(re.search(pattern, name) for name in names):
            logger.warning("%s: %r matches none of the %d linear layers.", option, pattern, len(names))


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution with low-rank forms, in one of the forms."""
    return is_linear(module) or has_conv_form(module) or isinstance(module, (nn.Conv1d, nn.Conv2d))


def _parents(model: nn.Module) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    return {name: modules[name.rpartition(".")[0]] for name in modules if name}


def _output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(head, nn.Module):
            yield head


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that two or more different modules hold."""
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {key for key, count in holders.items() if count > 1}


def _expert_counts(model: nn.Module) -> set[int]:
    configs = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    values = (getattr(c, field, None) for c in configs for field in _EXPERT_COUNT_FIELDS)
    return {v for v in values if isinstance(v, int) and v > 1}


def _pattern_reason(name: str, include: list[str] | None, exclude: list[str] | None) -> str | None:
    if include is not None and not _matches(name, include):
        return "not matched by include"
    if _matches(name, exclude):
        return "matched by exclude"
    return None


def _matches(name: str, patterns: list[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _unfit(name: str, module: nn.Module, around: _Surroundings) -> str | None:
    """Why a layer inside a block cannot be replaced, or None."""
    if isinstance(module, FormedLinear):
        return own_behaviour(module)
    owner = around.parents.get(name)
    if reason := odd_tensors(module):
        return reason
    weight = module._parameters["weight"]
    if weight is None or (not weight.requires_grad and form_of(module) == Dense()):
        return "frozen"
    if id(weight) in around.shared:
        return "tied or shared weight"
    if owner is not None and type(owner).__module__.startswith("torch.nn.") and not isinstance(owner, _CALLERS):
        return "owned by a torch.nn module"
    if name and _is_router(name, module, around):
        return "router of a mixture of experts"
    return own_behaviour(module)


def _is_router(name: str, module: nn.Module, around: _Surroundings) -> bool:
    """A gate of a mixture of experts: beside the experts, or in a router beside them, and named or shaped like one.

    A gated MLP's `gate_proj`, or a key projection as wide as there are experts, is none.
    """
    owner_name, _, leaf = name.rpartition(".")
    beside = id(around.parents[name]) in around.beside_experts
    router = _ROUTER_LEAF.fullmatch(owner_name.rpartition(".")[2]) is not None
    in_router = router and id(around.parents.get(owner_name)) in around.beside_experts
    outputs = getattr(module, "out_features", None)
    shaped = outputs == 1 or outputs in around.experts
    return bool(around.experts) and (in_router or (beside and (shaped or _ROUTER_LEAF.fullmatch(leaf) is not None)))
