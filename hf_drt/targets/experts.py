"""Fused experts in a model: which can change form, what stays dense and why, and how much of each token they see."""

from collections.abc import Iterator

from torch import nn

from hf_drt.forms import FROZEN, LEAVES, ExpertStack, place_of, stack_count, stored_transposed

FUSED = "fused experts"
KERNELS = (None, "eager", "batched_mm", "grouped_mm")
"""Implementations of experts whose products the factors can answer; others read the weights' memory."""

_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k", "moe_k")
_ALL_SEE_ALL = ("Llama4TextExperts",)


def fused_weights(owner: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and parameter of each fused weight that a module of experts holds.

    A module of experts is one with ``expert`` in the name of its class and parameters of its own of two dimensions
    or more.
    """
    if "expert" not in type(owner).__name__.lower() or type(owner).__module__.startswith("torch."):
        return
    for leaf, weight in owner._parameters.items():
        if weight is not None and weight.ndim >= 2 and "bias" not in leaf:
            yield leaf, weight


def unfit_experts(owner: nn.Module, leaf: str, weight: nn.Parameter) -> str | None:
    """Why a fused weight has to stay dense, or None."""
    implementation = getattr(getattr(owner, "config", None), "_experts_implementation", None)
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"{FUSED}, quantized"
    if stored_transposed(owner) is None or leaf not in LEAVES or weight.ndim != 3:
        return f"{FUSED} of an unknown layout"
    if not weight.requires_grad and leaf not in vars(owner).get(FROZEN, ()):
        return f"{FUSED}, frozen"
    if getattr(owner, "_is_expert_parallel", False):
        return f"{FUSED}, spread over processes"
    if implementation not in KERNELS:
        return f"{FUSED} of the kernel {implementation}"
    return None


def as_layer(owner: nn.Module, weight: nn.Parameter) -> ExpertStack:
    """A fused weight that can change form, as a layer."""
    return ExpertStack(weight, stored_transposed(owner))


def copies(model: nn.Module, name: str, layer: nn.Module) -> tuple[int, int]:
    """How many matrices of a layer's shape ``(out, in)`` there are, and by how many of them a token is multiplied.

    ``(1, 1)`` of a linear layer; E, and the experts per token by the model's configuration, of fused experts. Where it
    does not tell, and where a model multiplies every token by every expert (Llama 4), the second is E too.
    """
    count = stack_count(layer)
    if count is None:
        return 1, 1
    owner, _ = place_of(model, name)
    if type(owner).__name__ in _ALL_SEE_ALL:
        return count, count
    path = name.split(".")
    holders = [model.get_submodule(".".join(path[:end])) for end in range(len(path) - 1, -1, -1)]
    configs = [config for holder in holders if (config := getattr(holder, "config", None)) is not None]
    configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
    values = (getattr(config, field, None) for config in configs for field in _ACTIVE)
    return count, min(count, next((v for v in values if isinstance(v, int) and v > 0), count))
