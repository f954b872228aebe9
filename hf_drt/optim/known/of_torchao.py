"""The optimizers of torchao in a few bits. Their state begins anew: from 4,096 elements on it is a class of tensors of
its own, which holds codes."""

from hf_drt.optim.registry import OPTIMIZERS
from hf_drt.optim.rule import OptimizerRule

for _name, _bits, _optim in (
    ("AdamW8bit", "8 bits", {"adamw_torch_8bit": {"block_size": 256}}),
    ("AdamW4bit", "4 bits", {"adamw_torch_4bit": {"block_size": 256}}),
    ("Adam8bit", "8 bits", {}),
    ("Adam4bit", "4 bits", {}),
):
    OPTIMIZERS.add(
        f"torchao.optim.adam.{_name}",
        OptimizerRule(
            f"torchao's {_name.removesuffix('8bit').removesuffix('4bit')} in {_bits}; each new shape of a weight is "
            "compiled at its first step",
            optim=_optim,
            tested="torchao 0.18.0",
            compiled=True,
        ),
    )
