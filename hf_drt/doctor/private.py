"""What a report for others must not tell: names of users and machines, and paths."""

import contextlib
import getpass
import platform
import re
from pathlib import Path

_PATH = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?(?:[/\\][\w.+@~-]+){2,}")
_COMMON = {"", "root", "user", "admin", "ubuntu", "localhost", "local"}  # that name nobody, and stand in plain words


def scrubbed(text: str) -> str:
    """The text with the last part alone of every path, and without the names of the user and of the machine."""
    with contextlib.suppress(RuntimeError):  # a user without a home
        text = text.replace(str(Path.home()), "~")  # it may hold blanks
    text = _PATH.sub(lambda match: re.split(r"[/\\]", match[0])[-1], text)
    for name, word in _names().items():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", word, text)
    return text


def _names() -> dict[str, str]:
    try:
        users = {getpass.getuser(), Path.home().name}
    except (OSError, KeyError, RuntimeError):  # a user id without a name
        users = set()
    known = dict.fromkeys((platform.node(), platform.node().partition(".")[0]), "(machine)")
    known |= dict.fromkeys(users, "(user)")
    return {name: word for name, word in known.items() if name.lower() not in _COMMON}
