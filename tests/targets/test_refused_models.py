"""A model without a layer to change is refused with what was found in it."""

import pytest
import tiny
from torch import nn

from hf_drt import (
    find_targets,
)


@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (lambda: nn.Conv2d(1, 1, 1), {}, r"Conv2d has 0 transformer blocks.*as follows: 1 outside of the blocks"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, r"Sequential has 0 transformer blocks.*1 outside of the blocks"),
        (
            tiny.llama,
            {"include": ["conv"]},
            r"no layer to train in changing rank: LlamaForCausalLM has 2 transformer blocks, .*: 14 not matched by "
            r"include; 1 outside of the blocks\. include=\['conv'\], exclude=None; patterns are regular expressions on",
        ),
        (
            tiny.llama,
            {"exclude": [""]},
            r"14 matched by exclude; 1 outside of the blocks\. include=None, exclude=\[''\]",
        ),
        (lambda: tiny.llama().requires_grad_(False), {}, r"14 frozen"),
    ],
    ids=["no linear layer", "no block", "include", "exclude", "frozen"],
)
def test_a_model_without_a_target_is_refused_with_what_was_found(model, patterns, message):
    with pytest.raises(ValueError, match=message):
        find_targets(model(), **patterns)
