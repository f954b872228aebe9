"""Imports run one way. Each package or module may import those of its row, and nothing else of hf_drt: of another
package its face alone, the names in its ``__init__.py``."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hf_drt"

# fmt: off
ALLOWED = {
    "messages":   set(),
    "renamed":    set(),
    "registry":   set(),
    "lazy":       set(),
    "after_import": set(),
    "native_format": set(),
    "tables":     set(),
    "patterns":   set(),
    "config":     {"patterns", "registry", "schedule"},
    "schedule":   {"registry"},
    "precision":  {"schedule"},
    "linalg":     set(),
    "forms":      {"linalg", "registry", "tables"},
    "targets":    {"engines", "forms"},
    "activations": {"config", "forms", "targets"},
    "engines":    {"forms", "linalg", "registry"},
    "covariance": {"engines", "forms", "linalg"},
    "checkpoint": {"engines", "forms", "messages", "native_format", "schedule"},
    "planning":   {"config", "engines", "forms", "linalg", "precision", "schedule", "targets"},
    "optim":      {"config", "engines", "forms", "linalg", "registry", "targets"},
    "transition": {"engines", "forms", "optim", "targets"},
    "controller": {"checkpoint", "config", "covariance", "engines", "forms", "linalg", "optim", "planning", "precision",
                   "schedule", "targets", "transition"},
    "compress":   {"checkpoint", "config", "covariance", "forms", "linalg", "planning", "tables", "targets",
                   "transition"},
    "inspect":    {"checkpoint", "forms", "linalg", "planning", "schedule"},
    "simulate":   {"activations", "config", "controller", "engines", "forms", "optim", "planning", "schedule",
                   "transition"},
    "ema":        {"checkpoint", "engines", "forms", "linalg", "messages", "targets"},
    "doctor":     {"config", "controller", "engines", "forms", "linalg", "registry", "simulate", "trainer"},
    "export":     {"checkpoint", "config", "engines", "forms", "linalg", "messages", "native_format", "registry",
                   "schedule", "tables", "targets", "transition"},
    "trainer":    {"activations", "checkpoint", "config", "controller", "ema", "engines", "export", "forms", "optim",
                   "planning", "precision", "registry", "schedule", "targets", "transition"},
    "recovery":   {"compress", "covariance", "forms", "linalg", "tables", "targets", "trainer"},
    "report":     {"checkpoint", "schedule"},
    "cli":        {"activations", "checkpoint", "compress", "config", "controller", "doctor", "ema", "export", "forms",
                   "inspect", "messages", "optim", "planning", "precision", "recovery", "registry", "report",
                   "schedule", "simulate", "tables", "trainer"},
    "run":        {"config", "native_format", "trainer"},
    "trl":        {"trainer"},
}
STDLIB_ONLY = {"after_import", "config", "lazy", "messages", "native_format", "patterns", "registry", "renamed",
               "schedule", "tables"}
KNOWS_TRANSFORMERS = {"trainer", "export", "run", "cli", "doctor", "recovery"}
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
def test_of_another_package_only_the_face_is_imported(unit):
    for path in files(unit):
        deep = {name for name in imports(path) if name.count(".") > 1 and name.startswith("hf_drt.")}
        assert not {name for name in deep if name.split(".")[1] != unit}, path.relative_to(ROOT)


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


# What is tested across packages, or is no part of one.
ACROSS = {"distributed", "docs", "laws", "package", "recipes", "scripts", "sweep"}


def test_every_other_folder_of_tests_is_that_of_a_package():
    folders = {path.name for path in Path(__file__).parent.iterdir() if any(path.glob("*.py"))}
    packages = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert folders - ACROSS <= packages


def test_no_two_test_files_have_one_name():
    """pytest imports them by it, since the folders of tests are no packages."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
