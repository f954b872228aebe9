"""Modules under the names that they had in 0.1.0: they import with a warning for one release."""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

RENAMED = {
    "hf_drt.estimate": "hf_drt.simulate",
    "hf_drt.hub": "hf_drt.export",
    "hf_drt.hub.peft": "hf_drt.export.peft",
    "hf_drt.idle_settings": "hf_drt.planning.idle_settings",
    "hf_drt.selection": "hf_drt.targets.selection",
    "hf_drt.spectral": "hf_drt.linalg.spectral",
    "hf_drt.state": "hf_drt.checkpoint.state_file",
    "hf_drt.truncation": "hf_drt.linalg.truncation",
}


class _Alias(Loader):
    """Puts the module of the new name in the place of the old one, so that both are one object."""

    def create_module(self, spec: ModuleSpec) -> None:
        """The import system's own empty module, until :meth:`exec_module`."""

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = _new_name(old) or old  # the finder has found it
        warnings.warn(f"{old} is now {new}; the old name goes with the next release.", FutureWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


def _new_name(name: str) -> str | None:
    """Where a module is now, by itself or by the package that it was in; None if it has not moved."""
    parts = name.split(".")
    for end in range(len(parts), 1, -1):
        if (new := RENAMED.get(".".join(parts[:end]))) is not None:
            return ".".join([new, *parts[end:]])
    return None


class RenamedFinder(MetaPathFinder):
    """Finds what has moved; below an old package nothing but what is below the new one."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = _new_name(fullname)
        if new is None:
            return None
        if importlib.util.find_spec(new) is None:
            raise ModuleNotFoundError(f"No module named {fullname!r}, nor {new!r}", name=fullname)
        return ModuleSpec(fullname, _Alias(), is_package=True)


def accept_old_names() -> None:
    """Let ``import`` find the modules of :data:`RENAMED`; doing it again is harmless."""
    if not any(isinstance(finder, RenamedFinder) for finder in sys.meta_path):
        # First: an old package is the new one, in whose folder a second copy of its modules would be found.
        sys.meta_path.insert(0, RenamedFinder())
