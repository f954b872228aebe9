"""What is known of each optimizer, by the package that it comes from, with what the Trainer passes it."""

from hf_drt.optim.known import of_torch, of_transformers  # noqa: F401 (fill the registry)
