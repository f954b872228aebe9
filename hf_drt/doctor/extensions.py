"""Locks of extensions that are compiled at their first use, as DeepSpeed's are: a process waits for one for ever."""

import contextlib
import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

COMPILES = 1200  # seconds, which no compilation takes


def compiling() -> bool:
    """Whether there is a lock whose owner may still compile."""
    return any(age <= COMPILES for age in _ages().values())


def left_lock() -> str | None:
    """What to do about a lock whose owner was killed and has not taken it away; None if there is none."""
    for path, age in sorted(_ages().items()):
        if age > COMPILES:
            return (
                f"a process that was killed has left a file, {path.parent.name}/lock, where torch keeps extensions "
                f"({age / 60:.0f} minutes ago), and DeepSpeed waits until it is gone: delete it"
            )
    return None


def _ages() -> dict[Path, float]:
    """Seconds since each lock was made."""
    root, ages = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()), {}
    for path in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        with contextlib.suppress(FileNotFoundError):  # its owner is done
            ages[path] = time.time() - path.stat().st_mtime
    return ages
