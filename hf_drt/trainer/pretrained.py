"""Are a model's weights pretrained, or drawn at random?"""

from torch import nn


def is_pretrained(model: nn.Module) -> bool:
    """True if weights of the model came out of ``from_pretrained``, which marks the parameters that it loads.

    ``config.name_or_path`` does not tell: ``from_config`` on a downloaded configuration sets it too.
    """
    return any(getattr(p, "_is_hf_initialized", False) for p in model.parameters())
