"""Imports run one way. Each package or module may import those of its row, and nothing else of hf_drt."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hf_drt"

# fmt: off
ALLOWED = {
    "spectral":   set(),
    "config":     set(),
    "state":      set(),
    "schedule":   set(),
    "truncation": {"spectral"},
    "weight_files": {"state"},
    "tucker":     {"spectral"},
    "cp":         {"spectral"},
    "forms":      {"spectral", "truncation", "tucker", "cp", "config"},
    "cost":       {"forms", "schedule"},
    "convolutions": {"forms"},
    "experts":    {"forms"},
    "idle_settings": {"config", "forms", "schedule"},
    "evidence":   {"sharding"},
    "blocks":     {"convolutions", "forms"},
    "source_reading": set(),
    "holders":    set(),
    "selection":  {"blocks", "convolutions", "experts", "forms", "holders", "source_reading"},
    "surgery":    {"forms"},
    "wording":    set(),
    "timeline":   set(),
    "function_error": set(),
    "sharding":   set(),
    "ddp":        set(),
    "distributed": {"spectral", "forms", "sharding"},
    "export":     {"spectral", "forms", "surgery", "declaration"},
    "structure":  {"schedule", "forms", "wording"},
    "pretrained": {"config", "schedule", "forms", "cost", "evidence", "experts", "selection"},
    "declaration": {"forms"},
    "hub":        {"config", "forms", "selection", "surgery", "declaration", "state", "weight_files",
                   "timeline", "wording"},
    "adaptive":   {"schedule"},
    "budget":     set(),
    "compress":   {"budget", "config", "declaration", "forms", "selection", "spectral", "surgery"},
    "optim":      {"spectral", "config", "forms", "surgery", "sharding"},
    "transition": {"forms", "surgery", "optim", "distributed", "sharding"},
    "feasibility": {"config", "forms", "schedule"},
    "controller": {"adaptive", "spectral", "config", "schedule", "forms", "cost", "experts", "feasibility",
                   "function_error", "idle_settings", "selection", "surgery", "optim", "structure", "pretrained",
                   "sharding",
                   "transition", "declaration"},
    "estimate":   {"config", "controller", "forms", "schedule", "transition"},
    "trainer":    {"config", "schedule", "forms", "selection", "export", "optim", "controller", "state",
                   "ddp", "sharding", "pretrained", "declaration", "hub", "idle_settings", "weight_files",
                   "structure"},
    "inspection": {"declaration", "forms", "hub", "schedule", "spectral", "state", "weight_files"},
    "comparison": {"forms", "inspection", "spectral"},
    "report":     {"schedule", "state"},
    "cli":        {"comparison", "config", "controller", "estimate", "forms", "inspection", "report",
                   "pretrained", "schedule", "state", "timeline", "trainer"},
    "run":        {"config", "trainer"},
    "sweep":      {"config", "controller", "selection"},
    "trl":        {"trainer"},
}
STDLIB_ONLY = {"adaptive", "config", "schedule", "state", "budget", "wording"}
KNOWS_TRANSFORMERS = {"trainer", "hub", "run", "cli", "sweep"}
# fmt: on


def units() -> set[str]:
    return {
        p.stem for p in ROOT.iterdir() if p.stem != "__init__" and (p.suffix == ".py" or (p / "__init__.py").exists())
    }


def files(unit: str) -> list[Path]:
    return [ROOT / f"{unit}.py"] if (ROOT / f"{unit}.py").exists() else sorted((ROOT / unit).rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            found.add(node.module)
    return found


def test_every_unit_has_a_row():
    assert units() == set(ALLOWED)


@pytest.mark.parametrize("unit", ALLOWED)
def test_imports_stay_within_the_table(unit):
    for path in files(unit):
        own = {name.split(".")[1] for name in imports(path) if name.startswith("hf_drt.")} - {unit}
        assert own <= ALLOWED[unit], f"{path.relative_to(ROOT)} imports {own - ALLOWED[unit]}"


@pytest.mark.parametrize("unit", ALLOWED)
def test_third_party_imports_are_where_they_belong(unit):
    for path in files(unit):
        roots = {name.split(".")[0] for name in imports(path)}
        if unit in STDLIB_ONLY:
            assert not roots & {"torch", "transformers", "numpy"}, path
        if unit not in KNOWS_TRANSFORMERS:
            assert not roots & {"transformers", "accelerate"}, path
        assert "trl" not in roots or unit == "trl", path  # an optional dependency


def test_the_table_has_no_cycle():
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {unit for unit, needs in ALLOWED.items() if unit not in done and needs <= done}
        assert ready, f"cycle among {set(ALLOWED) - done}"
        done |= ready
