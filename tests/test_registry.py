"""The named members of a kind."""

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
    with pytest.raises(KeyError):
        registry.remove("red")
