"""Work that waits for a module to be imported, by whomever, so that it need not be imported for the work's sake."""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def registered_with(module: str, registrar: str, function: str) -> None:
    """Have ``registrar.function()`` called whenever ``module`` has been executed: now if it has been, else as soon as
    it is, and again if it is reloaded.

    Args:
        module: Dotted name of a module that may never be imported, and is not imported here.
        registrar: Dotted name of the module that holds the function; it is imported when ``module`` is there. It may
            import ``module`` itself, and then has to call the function itself too.
        function: Its name; calling it twice must be harmless.
    """
    finders = (finder for finder in sys.meta_path if isinstance(finder, _Finder))
    if all(finder.module != module for finder in finders):
        sys.meta_path.insert(0, _Finder(module, registrar, function))
    if module in sys.modules:
        _call(registrar, function)


def _call(registrar: str, function: str) -> None:
    # Not importlib.import_module: where two threads import the two modules, each waiting for the other, the statement
    # goes on with a module that is half done, and import_module raises.
    __import__(registrar)
    # None while the registrar is itself in the middle of its import, in this thread or in another; see above.
    call = getattr(sys.modules[registrar], function, None)
    if call is not None:
        call()


class _Finder(MetaPathFinder):
    """Finds one module where the finders after it find it, and calls a function once that is executed."""

    def __init__(self, module: str, registrar: str, function: str):
        self.module, self._registrar, self._function = module, registrar, function

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
            spec.loader = _Loader(spec.loader, self._registrar, self._function)
        return spec


class _Loader(Loader):
    """The module's own loader, which takes its place again before the module is executed."""

    def __init__(self, own: Loader, registrar: str, function: str):
        self._own, self._registrar, self._function = own, registrar, function

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        _call(self._registrar, self._function)
