"""The tools of the documentation and the recipes are scripts beside the package: their folders go on the path."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs" / "machinery"), str(ROOT / "recipes"), str(ROOT / "recipes" / "benchmarks")]
