"""Versions of the libraries, against those that hf_drt was tested with."""

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from hf_drt.doctor.check import Bench, Finding, found, not_tried

# The newest that all tests have passed with. The lowest, and where a limit is known what is too new, stand in
# pyproject.toml, which the package's metadata repeats.
NEWEST = {
    "torch": "2.13.0", "transformers": "5.24.0", "accelerate": "1.15.0", "huggingface_hub": "2.4.0", "numpy": "2.4.6",
    "safetensors": "0.8.0", "tqdm": "4.70.1", "peft": "0.21.2", "trl": "1.16.0", "matplotlib": "3.11.2",
    "typer": "0.29.2", "rich": "15.0.0", "apollo-torch": "1.0.3", "bitsandbytes": "0.50.2", "galore-torch": "1.0",
    "grokadamw": "0.1.2", "lomo-optim": "0.1.1", "schedulefree": "1.4.1", "torch-optimi": "0.3.3", "torchao": "0.18.0",
    "deepspeed": "0.19.8",
}  # fmt: skip
NOT_USED = ("test", "docs", "recipes", "libraries", "policy")
"""Extras that nothing in hf_drt itself imports."""

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(?P<bounds>[^;]*)(;.*extra == ['\"](?P<extra>[\w-]+)['\"])?")
_BOUND = re.compile(r"(>=|<|==)\s*([\w.]+)")
_COMPARED = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b, "==": lambda a, b: a == b}


@dataclass(frozen=True)
class Requirement:
    """What hf_drt asks of a package.

    Attributes:
        bounds: Such as ``((">=", "5.23"), ("<", "5.25"))``.
        extra: That asks for it; None for a dependency.
    """

    name: str
    bounds: tuple[tuple[str, str], ...]
    extra: str | None

    def broken(self, version: str) -> str | None:
        """The bound that a version breaks, or None."""
        for sign, bound in self.bounds:
            if not _COMPARED[sign](release(version), release(bound)):
                return f"{sign}{bound}"
        return None


def release(version: str) -> tuple[int, ...]:
    """``2.13.0+cpu`` as (2, 13): what stands before letters, without zeros at the end."""
    numbers = [int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part]  # type: ignore[index]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def requirements() -> list[Requirement]:
    """Of hf_drt, from its own metadata, as far as it imports them.

    Raises:
        metadata.PackageNotFoundError: It is run without having been installed.
    """
    listed: dict[str, Requirement] = {}
    for text in metadata.requires("hf-drt") or ():
        match = _REQUIREMENT.match(text)
        if match is not None and match["extra"] not in NOT_USED:
            bounds = tuple((sign, version) for sign, version in _BOUND.findall(match["bounds"]))
            listed.setdefault(match["name"], Requirement(match["name"], bounds, match["extra"]))
    return list(listed.values())


def check_versions(bench: Bench) -> Iterator[Finding]:
    """One finding for each package; a version that nobody has tried is not tried here either."""
    yield _python()
    try:
        asked = requirements()
    except metadata.PackageNotFoundError:
        yield not_tried("packages", "hf_drt is not installed, and its metadata says what was tested: pip install -e .")
        return
    for requirement in asked:
        yield compared(requirement, _installed(requirement.name))


def compared(requirement: Requirement, version: str | None) -> Finding:
    """A version that is installed, or None, against what was tested."""
    name, extra = requirement.name, requirement.extra
    if version is None:
        if extra is not None:
            return not_tried(name, f"not installed; it is of the extra '{extra}'")
        return found(name, False, "not installed")
    values = {"version": version, "newest tested": NEWEST.get(name)}
    if (bound := requirement.broken(version)) is not None:
        return found(name, False, f"{version}, but hf_drt needs {name}{bound}", values)
    newest = NEWEST.get(name)
    if newest is not None and release(version) > release(newest):
        return not_tried(name, f"{version} is newer than {newest}, the newest that was tested")
    return found(name, True, version, values)


def _python() -> Finding:
    version = platform.python_version()
    try:
        needed = metadata.metadata("hf-drt")["Requires-Python"] or ""
    except metadata.PackageNotFoundError:
        needed = ""
    broken = Requirement("python", tuple(_BOUND.findall(needed)), None).broken(version)
    seen = version if broken is None else f"{version}, but hf_drt needs python{broken}"
    return found("python", broken is None, seen, {"version": version})


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
