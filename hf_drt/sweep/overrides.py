"""What the rules of shrinking and of inputs do not reach, by model type.

``CONFIGS``: fields of the tiny configuration (``base``: of the full one that is shrunk). ``INPUTS``: see
:mod:`hf_drt.sweep.inputs`.
"""

from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {}

INPUTS: dict[str, Any] = {}
NEVER: dict[str, tuple[str, ...]] = {}
