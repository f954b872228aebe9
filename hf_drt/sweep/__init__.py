"""Does every architecture of the installed transformers go through all forms? ``python -m hf_drt.sweep``."""
