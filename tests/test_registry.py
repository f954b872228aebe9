"""The named members of a kind."""

import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass

import pytest

from hf_drt.registry import Registry


@dataclass(frozen=True)
class Toy:
    help: str


def toys(*names: str) -> Registry[Toy]:
    registry = Registry("toy", "hf_drt.messages")
    for name in names:
        registry.add(name, Toy(f"the {name} one"))
    return registry


def test_members_keep_their_order_and_describe_themselves():
    registry = toys("red", "blue")
    assert list(registry) == ["red", "blue"]
    assert len(registry) == 2
    assert registry.described() == "'red' (the red one), 'blue' (the blue one)"


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"toy must be one of red, blue, got 'green'\."):
        toys("red", "blue").find("green")


def test_what_is_not_a_text_is_refused_as_an_unknown_name():
    with pytest.raises(ValueError, match=r"toy must be one of red, got \['red'\]\."):
        toys("red").find(["red"])


def test_a_name_belongs_to_one_member():
    registry = toys("red")
    registry.add("red", registry["red"])
    with pytest.raises(ValueError, match=r"toy 'red' is registered already, .* names in use are red"):
        registry.add("red", Toy("another"))


def test_what_is_removed_is_gone():
    registry = toys("red", "blue")
    registry.remove("red")
    assert "red" not in registry
    with pytest.raises(ValueError, match="toy must be one of blue, got 'red'"):
        registry.remove("red")


class Named(Toy):
    name = "green"


class Unfinished(ABC):
    help = "lacks a method"

    @abstractmethod
    def act(self) -> None: ...


@pytest.mark.parametrize(
    ("name", "member", "message"),
    [
        (Toy, Toy("x"), r"a name of toy must be a text, got <class"),
        ("red", Toy, r"toy 'red' must be an object, not a class, got <class"),
        ("red", Toy(""), r"toy 'red' needs help=, half a sentence on what it is, got ''"),
        ("red", 3, r"toy 'red' needs help=, half a sentence on what it is, got None"),
    ],
)
def test_what_cannot_be_a_member_is_refused_at_once(name, member, message):
    registry = toys("blue")
    with pytest.raises(TypeError, match=message):
        registry.add(name, member)
    assert list(registry) == ["blue"]


def test_a_member_has_one_name():
    with pytest.raises(ValueError, match=r"toy 'red' calls itself 'green'\. Add it under that name, or change its own"):
        toys("blue").add("red", Named("x"))


def test_classes_and_objects_are_told_apart_and_have_to_be_complete():
    registry = Registry("toy", "hf_drt.messages", classes=True)
    with pytest.raises(TypeError, match=r"toy 'red' must be a class, not an object of it, got"):
        registry.add("red", Toy("x"))
    with pytest.raises(TypeError, match=r"toy 'red' lacks act\. Define them in Unfinished\."):
        registry.add("red", Unfinished)


def test_the_members_of_the_home_come_first():
    code = (
        "from hf_drt.registry import EXPORTERS\n"
        "class Toy: help = 'x'\n"
        "try: EXPORTERS.add('dense', Toy())\n"
        "except ValueError as error: print(error)\n"
        "EXPORTERS.remove('native'); print(list(EXPORTERS))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "export 'dense' is registered already" in out
    assert out.endswith("['dense', 'linear-pairs', 'adapter']\n")
