"""What the forms leave on modules that are not theirs."""

FROZEN = "_drt_frozen"
"""On a dense module whose form is a frozen W: whether its user had frozen it before. On a module of fused experts the
same of each such parameter, by name."""

SHOWN = "_drt_shown"
"""On a model whose layers make way, for a time, for dense ones of other values."""
