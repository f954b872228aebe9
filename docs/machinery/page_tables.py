"""The tables of the documentation that the code knows better: settings, presets, optimizers, results.

In a page a table stands between two comments, ``<!-- table: NAME -->`` and ``<!-- end of table -->``, so that it reads
on its own; this script writes it anew, and a test says where one is out of date::

    python docs/machinery/page_tables.py

What a command of the benchmarks prints from the records stands after ``<!-- benchmark: ARGUMENTS -->``. A new member of
a registry is a new row. A new table is a function here, with its name in ``TABLES``.
"""

import inspect
import io
import re
import shlex
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

from benchmark_results import BENCHMARKS, HEAD, result_rows

from hf_drt.cli.app import COMMANDS
from hf_drt.config import DRTConfig
from hf_drt.engines import ENGINES, import_engines
from hf_drt.forms import product_table
from hf_drt.optim import optimizer_rows, refused_rows
from hf_drt.registry import EXPORTERS
from hf_drt.schedule import PRESETS, Schedule, preset_rows
from hf_drt.tables import markdown_table

ROOT = Path(__file__).parents[2]
_PLACE = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
_PRINTED = re.compile(r"(<!-- benchmark: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
Rows = Iterable[Iterable[object]]


def table(head: Iterable[str], rows: Rows) -> str:
    """A table in Markdown. A ``|`` inside of a cell is escaped."""
    return markdown_table(list(head), [list(map(str, row)) for row in rows]) + "\n"


def code(value: object) -> str:
    """As code."""
    return f"`{value}`"


def codes(listed: str) -> str:
    """A list of names, each as code."""
    return ", ".join(map(code, filter(None, listed.split(", "))))


def sentence(documentation: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(inspect.cleandoc(documentation or "").split("\n\n")[0].split()).replace("``", "`")


# ---- one function per table


def settings() -> str:
    """Every field of DRTConfig, with its default and its help."""
    rows = ((code(f"drt_{f.name}"), default(f.default), help_of(f)) for f in fields(DRTConfig))
    return table(("argument", "default", "meaning"), rows)


def default(value: object) -> str:
    """A default as one writes it on a command line; nothing where it is unset."""
    return "unset" if value is None else code(value)


def help_of(field) -> str:
    """The help text, as a parser shows it; what stands in quotes there is code here."""
    text = field.metadata["help"].replace("%%", "%")
    return re.sub(r"(?<!\w)'([^']+)'(?!\w)", r"`\1`", text)


def presets() -> str:
    """Every preset as it is written with all options at their defaults, and the schedule text that it stands for."""
    texts = map(preset_text, PRESETS)
    rows = ((code(call), text, what, brings) for text, (call, what, brings) in zip(texts, preset_rows(), strict=True))
    return table(("preset, with its options", "stands for", "what it is", "settings that it brings"), rows)


def preset_text(name: str) -> str:
    """The schedule text of a preset; that of 'adaptive' is only its beginning."""
    schedule = Schedule.parse(name)
    text = code(" ".join(map(str, schedule.entries)))
    return text if schedule.adapters is None else f"{text}; with adapters {code(schedule.where('adapter'))}"


def optimizers() -> str:
    """Every optimizer that follows a change of form, and what of its state does."""
    head = (
        "optimizer", "`optim=` of the Trainer", "what it is", "what `drt_moments=project` carries over",
        "what begins anew even so", "tested with",
    )  # fmt: skip
    rows = sorted(optimizer_rows(), key=lambda row: _package_order(row[0]))
    return table(head, ((codes(names), codes(optim), *others) for names, optim, *others in rows))


def _package_order(name: str) -> tuple[int, str]:
    """Packages that everybody has come first, the others by name."""
    package = name.partition(".")[0]
    first = ("torch", "transformers")
    return (first.index(package) if package in first else len(first), package)


def refused_optimizers() -> str:
    """Every optimizer that is known and cannot follow, and why."""
    head = ("optimizer", "`optim=` of the Trainer", "why not, and what can", "seen with")
    return table(head, ((codes(names), codes(optim), *others) for names, optim, *others in refused_rows()))


def engines() -> str:
    """Every engine: how the weights of a model are spread over processes."""
    import_engines()  # of those that otherwise wait until their libraries are imported
    return table(("engine", "what it is"), ((code(name), engine.help) for name, engine in ENGINES.items()))


def exports() -> str:
    """Every exporter, and how what it writes is loaded."""
    rows = ((code(name), exporter.help, exporter.loading) for name, exporter in EXPORTERS.items())
    return table(("`drt_export`", "what it is", "how it loads"), rows)


def decompositions() -> str:
    """What the low-rank form of a layer may be."""
    return product_table() + "\n"


def commands() -> str:
    """The commands of ``hf-drt``."""
    rows = ((code(f"hf-drt {name}"), line) for name, line in COMMANDS.items())
    return table(("command", "what it tells or does"), rows)


def results() -> str:
    """The default against dense training, as the benchmarks have recorded it."""
    return table(HEAD, result_rows())


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings,
    "presets": presets,
    "optimizers": optimizers,
    "refused optimizers": refused_optimizers,
    "engines": engines,
    "exports": exports,
    "decompositions": decompositions,
    "commands": commands,
    "results": results,
}


def filled(text: str) -> str:
    """The page with its tables as the code has them.

    Raises:
        KeyError: The page has a table that is not in TABLES.
    """
    text = _PLACE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)
    return _PRINTED.sub(lambda match: match[1] + printed(match[2]) + match[3], text)


def printed(arguments: str) -> str:
    """What ``benchmark.py`` prints, which must read records only."""
    import benchmark

    with redirect_stdout(io.StringIO()) as out:
        benchmark.main(shlex.split(arguments))
    return out.getvalue().rstrip("\n") + "\n"


def pages() -> list[Path]:
    """All that may hold a table."""
    return [ROOT / "README.md", BENCHMARKS / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
