"""Tables of text, written in one place: aligned columns, Markdown, and rich's in a terminal."""

from collections.abc import Iterable, Sequence

Row = Sequence[str]


def plain_table(columns: Row, rows: Sequence[Row], left: int = 1) -> str:
    """Columns two blanks apart, the first ``left`` of them text and the others numbers; a cell holds no blank at its
    ends, so that the columns stay where they are."""
    lines = [columns, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown_table(columns: Row, rows: Iterable[Row]) -> str:
    """A table in Markdown; a ``|`` inside of a cell is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in line)} |" for line in lines)


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


def print_table(columns: Row, rows: Sequence[Row], left: int = 1, title: str | None = None, width: int = 0) -> None:
    """Print a table: in a terminal with lines, and at least ``width`` wide; else as :func:`plain_table`."""
    from rich.console import Console  # of the extras 'cli' and 'recipes'
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        print(*filter(None, (title, plain_table(columns, rows, left))), sep="\n")
        return
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(width=max(console.width, width)).print(table, markup=False)
