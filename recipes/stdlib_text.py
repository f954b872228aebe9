"""Text that is on every machine: the source of Python's own standard library."""

import hashlib
import sysconfig
from pathlib import Path


def stdlib_files() -> dict[str, str]:
    """Path below the library's folder -> source text, sorted; installed packages and tests are left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not any(part in ("site-packages", "test", "tests", "idlelib", "lib2to3") for part in name.split("/")):
            files[name] = path.read_text(encoding="utf-8", errors="replace")
    return files


def digest(texts: list[str]) -> str:
    """Twelve hexadecimal digits of the content, to name caches and to say which text a result is of."""
    sha = hashlib.sha256()
    for text in texts:
        sha.update(text.encode())
        sha.update(b"\0")
    return sha.hexdigest()[:12]
