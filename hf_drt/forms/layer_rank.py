"""The effective rank of layers, whatever their form."""

from collections.abc import Iterable

from torch import nn

from hf_drt.forms.modules import FactoredLinear, effective_weight
from hf_drt.forms.stack import stack_count
from hf_drt.linalg import effective_rank, factored_singular_values, gram_singular_values


def layer_rank(module: nn.Module) -> float:
    """Effective rank of W (Roy and Vetterli 2007), of fused experts their mean; of factors from r x r matrices only."""
    count = stack_count(module)
    experts = range(count) if count is not None else [...]
    if isinstance(module, FactoredLinear):
        L, R, _ = module.pair()
        spectra = [factored_singular_values(L[e], R[e]) for e in experts]
    else:
        W = effective_weight(module)
        spectra = [gram_singular_values(W[e]) for e in experts]
    return sum(map(effective_rank, spectra)) / len(spectra)


def layer_ranks(layers: Iterable[tuple[str, nn.Module]]) -> dict[str, float]:
    """:func:`layer_rank` of each layer, by name.

    Raises:
        ValueError: A weight holds inf or nan; the message names the layer.
    """
    ranks = {}
    for name, layer in layers:
        try:
            ranks[name] = layer_rank(layer)
        except ValueError as error:
            raise ValueError(f"the effective rank of {name}: {error}") from None
    return ranks
