"""The tables that the code knows better are what the code says, and a new member is a new row."""

from dataclasses import fields
from types import SimpleNamespace

import page_tables
import pytest
from pages import PAGES

from hf_drt import DRTConfig
from hf_drt.optim import OPTIMIZERS, public_name
from hf_drt.registry import EXPORTERS, PRODUCTS
from hf_drt.schedule import PRESETS


@pytest.fixture
def own_members():
    """The registries without what other tests have added."""
    others = [
        (registry, name, member)
        for registry in (EXPORTERS, PRODUCTS)
        for name, member in registry.items()
        if not type(member).__module__.startswith("hf_drt.")
    ]
    for registry, name, _ in others:
        registry.remove(name)
    yield
    for registry, name, member in others:
        registry.add(name, member)


@pytest.mark.usefixtures("own_members")
@pytest.mark.parametrize("page", [*PAGES, page_tables.BENCHMARKS / "RESULTS.md"], ids=lambda page: page.name)
def test_the_page_is_up_to_date(page):
    text = page.read_text(encoding="utf-8")
    assert page_tables.filled(text) == text, "run: python docs/machinery/page_tables.py"


def test_every_table_is_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in page_tables.TABLES if f"<!-- table: {name} -->" not in text] == []


def cells(name: str) -> list[list[str]]:
    """The rows of a table below its head."""
    lines = page_tables.TABLES[name]().splitlines()
    return [[cell.strip().strip("`") for cell in line.replace(r"\|", "¦").split("|")[1:-1]] for line in lines[2:]]


def test_settings_are_the_fields_of_the_configuration():
    found = {name: (default, meaning) for name, default, meaning in cells("settings")}
    assert list(found) == [f"drt_{field.name}" for field in fields(DRTConfig)]
    for field in fields(DRTConfig):
        default, meaning = found[f"drt_{field.name}"]
        assert default == ("unset" if field.default is None else str(field.default))
        assert meaning.split()[0].strip("`'") == field.metadata["help"].split()[0].strip("'")


def test_presets_are_those_of_the_registry():
    assert [row[0].partition("(")[0] for row in cells("presets")] == list(PRESETS)
    assert ["cyclic(windows=2,share=40)", "lowrank@0 dense@15% lowrank@35% dense@65% lowrank@85%"] in [
        row[:2] for row in cells("presets")
    ]


def test_optimizers_are_those_of_the_registry():
    rows = [*cells("optimizers"), *cells("refused optimizers")]
    found = {name.rpartition(".")[2] for row in rows for name in row[0].replace("`", "").split(", ")}
    assert found == {public_name(name).rpartition(".")[2] for name in OPTIMIZERS}


@pytest.mark.parametrize(("table", "registry"), [("exports", EXPORTERS), ("decompositions", PRODUCTS)])
def test_a_new_member_is_a_new_row(table, registry):
    toy = {"name": "toy", "help": "what a toy is", "loading": "with care", "weights": "few", "found_by": "luck"}
    registry.add("toy", SimpleNamespace(**toy))
    try:
        assert cells(table)[-1][:2] == ["toy", "what a toy is"]
    finally:
        registry.remove("toy")
    assert [row[0] for row in cells(table)] == list(registry)


def test_a_page_with_an_unknown_table_is_an_error():
    with pytest.raises(KeyError, match="nothing"):
        page_tables.filled("<!-- table: nothing -->\n<!-- end of table -->")


def test_what_the_benchmarks_print_from_the_records_stands_in_a_page():
    text = "before\n<!-- benchmark: table brown_lm_small --seeds 1 -->\nold\n<!-- end of table -->\nafter\n"
    lines = page_tables.filled(text).splitlines()
    assert lines[0:2] == text.splitlines()[:2]
    assert lines[-2:] == text.splitlines()[-2:]
    assert lines[2].startswith("| brown_lm_small | value |")
    assert any(line.startswith("| dense | ") for line in lines)
