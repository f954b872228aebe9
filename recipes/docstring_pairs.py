"""Prompts and completions that are on every machine: functions of Python's standard library and their docstrings."""

import ast
from collections.abc import Iterator

import datasets
from stdlib_text import stdlib_files

EVALUATION_SHARE = 20  # one module in so many is held out
LONGEST = 300  # characters of a docstring's first paragraph, and of a signature


def docstring_dataset(max_train: int | None = None, max_eval: int | None = None) -> datasets.DatasetDict:
    """Splits ``train`` and ``test`` with the columns ``prompt`` (up to the opening quotes) and ``completion``.

    Whole modules are held out, so that no near-copy of a function is on both sides. Shuffled in a fixed way; ``max_*``
    cut the splits.

    Raises:
        ValueError: A limit is below 1.
    """
    limits = {"train": max_train, "test": max_eval}
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"the {name} split must keep at least 1 sample, got a limit of {limit}.")
    splits: dict[str, list[dict[str, str]]] = {name: [] for name in limits}
    seen: set[str] = set()
    for number, source in enumerate(stdlib_files().values()):
        split = "test" if number % EVALUATION_SHARE == 0 else "train"
        for prompt, completion in pairs(source):
            if completion not in seen:
                seen.add(completion)
                splits[split].append({"prompt": prompt, "completion": completion})
    made = datasets.DatasetDict({name: datasets.Dataset.from_list(rows).shuffle(0) for name, rows in splits.items()})
    for name, limit in limits.items():
        made[name] = made[name].select(range(min(limit or len(made[name]), len(made[name]))))
    return made


def pairs(source: str) -> Iterator[tuple[str, str]]:
    """(signature and opening quotes, first paragraph of the docstring and closing quotes) of a module's functions."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # templates and the like
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            paragraph = " ".join(text.partition("\n\n")[0].split())
            word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            signature = f"{word} {node.name}({ast.unparse(node.args)}):"
            if 20 <= len(paragraph) <= LONGEST and len(signature) <= LONGEST:
                yield f'{signature}\n    """', f'{paragraph}"""'
