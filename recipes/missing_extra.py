"""Packages that a recipe wants beside those of the extra `recipes`."""

import importlib
from types import ModuleType


def wanted(module: str, extra: str, beside: str = "") -> ModuleType:
    """Import a module.

    Args:
        module: Its name.
        extra: Of pyproject.toml, that brings it.
        beside: What else is to be installed, as words of a command.

    Raises:
        SystemExit: It, or what it imports, is not installed; the message says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        then = f" && {beside}" if beside else ""
        raise SystemExit(
            f"This recipe wants {error.name}, which is not installed. Install what it needs: "
            f"pip install -e '.[{extra}]'{then}"
        ) from None
