"""What is known of each optimizer, by the package that it comes from, with what the Trainer passes it."""

from hf_drt.optim.known import (  # noqa: F401 (fill the registry)
    of_accelerators,
    of_bitsandbytes,
    of_grokadamw,
    of_lomo,
    of_optimi,
    of_projections,
    of_schedulefree,
    of_torch,
    of_torchao,
    of_transformers,
)
