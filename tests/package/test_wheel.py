"""What is built from the sources: the wheel and the source distribution, and hf_drt as installed from the wheel."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (".ci", "docs", "findings", "hf_drt", "recipes", "tests", "tools")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache", ".hypothesis", "runs", "site")


def run(*command: object, folder: Path, **environment: str) -> str:
    """What the command prints; its error output is in the failure's message."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env={**clean, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def sources() -> list[Path]:
    return [p for p in ROOT.iterdir() if p.name in FOLDERS or (p.is_file() and p.name != ".git")]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution and the wheel that was built from it, as ``python -m build`` does.

    The sources are copied: a build leaves folders behind, from which later ones take what is no longer there.
    """
    copy = tmp_path_factory.mktemp("sources")
    for path in sources():
        if path.is_dir():
            shutil.copytree(path, copy / path.name, ignore=NOT_SOURCES)
        else:
            shutil.copy2(path, copy)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy, folder=copy)
    return folder


@pytest.fixture(scope="module")
def wheel(built) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new virtual environment with the wheel and the libraries of this one.

    They are found by a line in a .pth file: a path that is added so brings no .pth file of its own into force, and with
    it no editable install, so that hf_drt can come from the wheel alone.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    python = folder / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        folder=folder,
    )
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    libraries = sysconfig.get_path("purelib")
    (folder / "lib" / version / "site-packages" / "libraries.pth").write_text(libraries + "\n")
    return folder


def version() -> str:
    """``hf_drt.__version__``, read without importing it."""
    tree = ast.parse((ROOT / "hf_drt" / "__init__.py").read_text())
    assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
    (value,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "__version__"]
    return ast.literal_eval(value)


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def metadata(wheel: Path) -> email.message.Message:
    (name,) = [name for name in names(wheel) if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(name))


def files_of(folder: str) -> set[str]:
    """Files below ``folder`` that are sources, relative to the repository."""
    paths = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path) for path in paths if not {part for part in path.parts if NOT_SOURCES(".", [part])}}


def test_the_wheel_holds_hf_drt_whole_and_nothing_else(wheel):
    packaged = {name for name in names(wheel) if ".dist-info/" not in name}
    assert packaged == files_of("hf_drt")
    assert {"hf_drt/py.typed", "hf_drt/report/assets/page.css"} <= packaged


def test_the_source_distribution_holds_all_sources(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    top = {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml"}
    assert top | {".pre-commit-config.yaml"} <= held
    assert set().union(*map(files_of, FOLDERS)) - held == set()


def test_the_metadata_say_what_pyproject_says(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = metadata(wheel)
    assert found["Version"] == version()
    assert found["License-Expression"] == "Apache-2.0"
    assert found.get_all("License-File") == ["LICENSE"]
    assert found["Author"] == "The hf_drt authors"
    assert {url.split(", ")[0] for url in found.get_all("Project-URL")} == {"Homepage", "Issues", "Changelog"}
    assert set(found.get_all("Provides-Extra")) == set(project["optional-dependencies"])


def test_the_installed_package_is_the_wheel_s(environment, tmp_path):
    code = "import hf_drt, importlib.metadata as m; print(hf_drt.__file__, hf_drt.__version__, m.version('hf-drt'))"
    file, own, installed = run(environment / "bin" / "python", "-c", code, folder=tmp_path).split()
    assert Path(file).is_relative_to(environment)
    assert own == installed == version()


def test_the_command_is_installed(environment, tmp_path):
    shown = run(environment / "bin" / "hf-drt", "--help", folder=tmp_path)
    assert {"plan", "inspect", "export", "compare", "report"} <= set(re.findall(r"\w+", shown))


def test_the_first_example_of_the_readme_runs(environment, tmp_path):
    example = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "example.py").write_text(example)
    run(environment / "bin" / "python", "example.py", folder=tmp_path, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    assert list(tmp_path.rglob("model.safetensors"))
