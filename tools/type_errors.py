"""The errors that pyright finds in hf_drt may become fewer, never more.

    python tools/type_errors.py

compares their number with the one in type_errors.txt and fails if it has risen. Where it has fallen, write the new one
there. ``pyright hf_drt/FILE.py`` shows what is wrong in a file.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = Path(__file__).with_name("type_errors.txt")


def errors(project: Path) -> Counter[str]:
    """Number of pyright's errors in every file of ``project``, as its pyproject.toml sets pyright up.

    Raises:
        RuntimeError: pyright gave no result.
    """
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", "."]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: there are errors
        raise RuntimeError(f"pyright gave no result: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = [one for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    return Counter(str(Path(one["file"]).resolve().relative_to(project.resolve())) for one in found)


def verdict(found: int, allowed: int, limit: Path) -> tuple[bool, str]:
    """Whether ``found`` errors may be, and the sentence that says so."""
    if found > allowed:
        return False, (
            f"pyright finds {found} errors, {found - allowed} more than the {allowed} in {limit.name}: mend those of "
            "the change, which `pyright FILE` shows."
        )
    if found < allowed:
        return True, f"pyright finds {found} errors, fewer than the {allowed} in {limit.name}: write {found} there."
    return True, f"pyright finds {found} errors, as many as {limit.name} allows."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--project", type=Path, default=ROOT, help="folder with a pyproject.toml")
    parser.add_argument("--limit", type=Path, default=LIMIT, help="file with the number of errors that are allowed")
    options = parser.parse_args()
    found = errors(options.project)
    passed, sentence = verdict(found.total(), int(options.limit.read_text()), options.limit)
    if not passed:
        print(*(f"{count:5}  {name}" for name, count in found.most_common()), sep="\n")
    print(sentence)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
