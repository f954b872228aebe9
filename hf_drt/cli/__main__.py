"""``python -m hf_drt.cli``."""

from hf_drt.cli import main

main()
