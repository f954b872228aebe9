"""Registries: the named members of a kind, each added by the one file that implements it.

A setting names a member by text. What it allows, its help and the tables of the documentation are read from here, so
that a new member appears in all of them by being added::

    EXPORTERS.add("toy", Toy(...))
"""

import importlib
from collections.abc import Iterator, Mapping
from typing import Protocol, TypeVar


class Member(Protocol):
    """What a registry can hold."""

    @property
    def help(self) -> str:
        """What it is, in half a sentence, as it stands behind its name in a help text."""
        ...


M = TypeVar("M", bound=Member)


class Registry(Mapping[str, M]):
    """Members by name, in the order in which they were added.

    Args:
        setting: Name of the setting that chooses one, for messages.
        home: Package whose import adds this package's own members; imported when the registry is first read.
    """

    def __init__(self, setting: str, home: str):
        self.setting, self._home = setting, home
        self._members: dict[str, M] = {}

    def add(self, name: str, member: M) -> M:
        """Register a member.

        Raises:
            ValueError: The name is taken by another one.
        """
        if self._members.get(name, member) is not member:
            raise ValueError(
                f"{self.setting} '{name}' is registered already, for {self._members[name]!r}. Take another name; the "
                f"names in use are {', '.join(self._members)}."
            )
        self._members[name] = member
        return member

    def remove(self, name: str) -> None:
        """Take a member out again, as after a test.

        Raises:
            KeyError: There is none of this name.
        """
        del self._members[name]

    def __getitem__(self, name: str) -> M:
        return self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())

    def find(self, name: str) -> M:
        """The member of a name that a user has given.

        Raises:
            ValueError: There is none; the message names those that there are.
        """
        if not isinstance(name, str) or name not in self:
            raise ValueError(f"{self.setting} must be one of {', '.join(self)}, got {name!r}.")
        return self[name]

    def described(self) -> str:
        """All names with their help, as for a help text: ``'a' (what it is), 'b' (...)``."""
        return ", ".join(f"'{name}' ({member.help})" for name, member in self.items())

    def _loaded(self) -> dict[str, M]:
        importlib.import_module(self._home)
        return self._members


# Those that settings name, here so that config.py needs none of the packages: filled as their home is imported.
EXPORTERS: Registry = Registry("export", "hf_drt.export")
PRODUCTS: Registry = Registry("decomposition", "hf_drt.forms")
