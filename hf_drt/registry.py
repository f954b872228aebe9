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
        classes: Whether the members are classes; else they are objects.
    """

    def __init__(self, setting: str, home: str, classes: bool = False):
        self.setting, self._home, self._classes = setting, home, classes
        self._members: dict[str, M] = {}
        self._complete = False

    def add(self, name: str, member: M) -> M:
        """Register a member.

        Raises:
            TypeError: The name is not a text, or the member is an object where a class is needed or the other way
                round, has no help, or has methods that are still abstract.
            ValueError: The name is taken by another one, or the member has another name of its own.
        """
        importlib.import_module(self._home)  # whose members come first
        self._check(name, member)
        if self._members.get(name, member) is not member:
            raise ValueError(
                f"{self.setting} '{name}' is registered already, for {self._members[name]!r}. Take another name; the "
                f"names in use are {', '.join(self._members)}."
            )
        self._members[name] = member
        return member

    def _check(self, name: str, member: M) -> None:
        if not isinstance(name, str):
            raise TypeError(f"a name of {self.setting} must be a text, got {name!r}.")
        if isinstance(member, type) != self._classes:
            wanted = "a class, not an object of it" if self._classes else "an object, not a class"
            raise TypeError(f"{self.setting} '{name}' must be {wanted}, got {member!r}.")
        if missing := sorted(getattr(member, "__abstractmethods__", ()) if isinstance(member, type) else ()):
            cls = getattr(member, "__name__", member)
            raise TypeError(f"{self.setting} '{name}' lacks {', '.join(missing)}. Define them in {cls}.")
        help = getattr(member, "help", None)
        if not isinstance(help, str) or not help.strip():
            raise TypeError(f"{self.setting} '{name}' needs help=, half a sentence on what it is, got {help!r}.")
        own = getattr(member, "name", name)
        if isinstance(own, str) and own != name:
            raise ValueError(
                f"{self.setting} '{name}' calls itself '{own}'. Add it under that name, or change its own."
            )

    def remove(self, name: str) -> None:
        """Take a member out again, as after a test.

        Raises:
            ValueError: There is none of this name.
        """
        self.find(name)
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
        if not self._complete:  # an import, be it of what is there, breaks the graph of a compiler
            importlib.import_module(self._home)
            self._complete = True
        return self._members


# Those that settings name, here so that config.py needs none of the packages: filled as their home is imported.
EXPORTERS: Registry = Registry("export", "hf_drt.export")
PRODUCTS: Registry = Registry("decomposition", "hf_drt.forms")
