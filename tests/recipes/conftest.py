"""Recipes are scripts beside the package: their folder goes on the path, as it does when one is run."""

import sys
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
sys.path[:0] = [str(RECIPES), str(RECIPES / "benchmarks")]
