"""The lowest or the newest versions that pyproject.toml could mean, as requirements for pip.

    pip install $(python tools/requirements.py lowest)
    pip install --upgrade $(python tools/requirements.py newest)

``lowest`` has every dependency at its lower bound. ``newest`` leaves the upper bounds out, and torch, whose build the
user chooses; pip then says that hf-drt wants another version, and installs it all the same.
"""

import argparse
import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_DEPENDENCY = re.compile(r"(?P<name>[\w.-]+)>=(?P<lowest>[\w.]+)(,<(?P<upper>[\w.]+))?")


def dependencies(pyproject: Path = PYPROJECT) -> dict[str, tuple[str, str | None]]:
    """Lower and upper bound of every dependency, by its name; None where there is no upper one."""
    found = {}
    for text in tomllib.loads(pyproject.read_text())["project"]["dependencies"]:
        match = _DEPENDENCY.fullmatch(text)
        if match is None:
            raise ValueError(
                f"dependency {text!r} of {pyproject.name} is not written as name>=lowest or name>=lowest,<upper."
            )
        found[match["name"]] = match["lowest"], match["upper"]
    return found


def lowest(bounds: dict[str, tuple[str, str | None]]) -> list[str]:
    """Every dependency at its lower bound."""
    return [f"{name}=={lower}" for name, (lower, _) in bounds.items()]


def newest(bounds: dict[str, tuple[str, str | None]]) -> list[str]:
    """The names without bounds, torch apart."""
    return [name for name in bounds if name != "torch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", choices=("lowest", "newest"))
    choose = {"lowest": lowest, "newest": newest}[parser.parse_args().which]
    print(*choose(dependencies()))


if __name__ == "__main__":
    main()
