"""Modules that moved are found under their old names for one release."""

import importlib
import sys

import forked
import pytest

import hf_drt
from hf_drt.renamed import RENAMED


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_the_old_name_gives_the_module_and_a_warning(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    spec = importlib.import_module(new).__spec__
    with pytest.warns(FutureWarning, match=rf"{old} is now {new}; the old name goes with the next release"):
        assert importlib.import_module(old) is importlib.import_module(new)
    assert importlib.import_module(new).__spec__ is spec


def test_names_can_be_imported_from_an_old_path():
    code = "from hf_drt.hub.peft import save_peft_adapter as old; from hf_drt.export import save_peft_adapter as new; "
    code += "print(old is new)"
    result = forked.python("-c", code)
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr


def test_another_name_is_still_unknown():
    with pytest.raises(ModuleNotFoundError, match=r"hf_drt\.nothing"):
        importlib.import_module("hf_drt.nothing")
    assert hf_drt.__spec__ is not None


def test_below_an_old_package_a_module_is_the_one_of_the_new_package():
    code = (
        "import hf_drt.export.card as new, hf_drt.hub.card as old; print(old is new, new.__name__); "
        "from hf_drt.hub.peft.save import save_peft_adapter as s; import hf_drt.export as e; "
        "print(s is e.save_peft_adapter)"
    )
    result = forked.python("-c", code)
    assert (result.returncode, result.stdout) == (0, "True hf_drt.export.card\nTrue\n"), result.stderr


def test_what_is_in_neither_package_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'hf_drt.hub.nothing', nor 'hf_drt.export.nothing'"):
        importlib.import_module("hf_drt.hub.nothing")
