"""Work that waits for a module to be imported, by whomever, so that it need not be imported for the work's sake."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def called_after(module: str, function: Callable[[ModuleType], None]) -> None:
    """Have ``function(module)`` called whenever a module has been executed: now if it has been, else as soon as it is,
    and again if it is reloaded.

    Args:
        module: Dotted name of a module that may never be imported, and is not imported here.
        function: Must import nothing, since it is called while the import system holds the module's lock: another
            thread may hold that of what it would import, and wait for this one. Calling it twice must be harmless.
    """
    finders = (finder for finder in sys.meta_path if isinstance(finder, _Finder))
    if all(finder.module != module for finder in finders):
        sys.meta_path.insert(0, _Finder(module, function))
    if module in sys.modules:
        function(sys.modules[module])


class _Finder(MetaPathFinder):
    """Finds one module where the finders after it find it, and calls a function once that is executed."""

    def __init__(self, module: str, function: Callable[[ModuleType], None]):
        self.module, self._function = module, function

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        # Those after this one only: a finder of somebody else that asks all the others, as this one does, is not asked
        # by this one and asking it at once.
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(fullname, path, target) for finder in later if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._function)
        return spec


class _Loader(Loader):
    """The module's own loader, which takes its place again before the module is executed."""

    def __init__(self, own: Loader, function: Callable[[ModuleType], None]):
        self._own, self._function = own, function

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        self._function(module)
