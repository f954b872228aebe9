"""The rules of all optimizers as rows, for the tables of the documentation."""

from collections.abc import Iterator

from hf_drt.optim.registry import OPTIMIZERS, public_name
from hf_drt.optim.rule import OptimizerRule


def optimizer_rows() -> Iterator[tuple[str, str, str, str, str, str]]:
    """A row for every rule that follows, for a table: classes, values of ``optim``, what it is, what
    ``moments=project`` carries over, what begins anew in any case, and what it was tested with."""
    for names, rule in _by_rule():
        if not rule.refused:
            yield names, ", ".join(rule.optim), rule.help, rule.carried(), rule.anew, rule.tested


def refused_rows() -> Iterator[tuple[str, str, str, str]]:
    """A row for every rule that refuses, for a table: classes, values of ``optim``, why, and what it was tested
    with."""
    for names, rule in _by_rule():
        if rule.refused:
            yield names, ", ".join(rule.optim), rule.refused + rule.instead(), rule.tested


def _by_rule() -> Iterator[tuple[str, OptimizerRule]]:
    """Every rule with the public names of its classes."""
    classes: dict[int, list[str]] = {}
    for name, rule in OPTIMIZERS.items():
        classes.setdefault(id(rule), []).append(public_name(name))
    rules = {id(rule): rule for rule in OPTIMIZERS.values()}
    for key, names in classes.items():
        yield ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])]), rules[key]
