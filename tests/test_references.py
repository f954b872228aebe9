"""References in docstrings and comments: whatever is named by its full path is there."""

import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import hf_drt

ROOT = Path(hf_drt.__file__).parent
_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr|exc):`~?(hf_drt(?:\.\w+)+)`")


def references() -> list[str]:
    return sorted({name for path in ROOT.rglob("*.py") for name in _ROLE.findall(path.read_text())})


def found(name: str) -> Any:
    """The object, or None."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


def resolves(name: str) -> bool:
    """Also a field without a default, which its class has as an annotation alone."""
    owner, _, leaf = name.rpartition(".")
    return found(name) is not None or leaf in getattr(found(owner), "__annotations__", {})


@pytest.mark.parametrize("name", references())
def test_what_is_referred_to_by_its_full_path_is_there(name):
    assert resolves(name)


@pytest.mark.parametrize("name", ["hf_drt.forms.ConvShape", "hf_drt.nowhere.Thing", "hf_drt.optim.index.GroupIndex.a"])
def test_what_is_not_there_is_found_out(name):
    assert not resolves(name)


def test_references_are_found():
    assert "hf_drt.DynamicRank" in references()
