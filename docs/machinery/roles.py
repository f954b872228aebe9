"""Cross-references of docstrings, as ``:class:`hf_drt.DRTConfig```, made links of the site where they have an aim."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|attr|mod|exc):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Rewrites the docstring of every object as it is read."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        """Put links in the place of roles; a name without an aim stays code."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(self._link, obj.docstring.value)

    def _link(self, match: re.Match) -> str:
        return f'<autoref identifier="{match[1]}" optional><code>{match[1]}</code></autoref>'
