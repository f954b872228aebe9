"""What a run did, for people to look at: from its folder to one HTML page and to pictures.

Imports run one way: run_files, clock -> run_data -> tables -> page, figures -> size_curve. Only the last two need
matplotlib: they are imported when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_drt.report.page import write_page
from hf_drt.report.run_data import RunData, read_runs
from hf_drt.report.run_files import RunError

if TYPE_CHECKING:
    from hf_drt.report.figures import write_figures
    from hf_drt.report.size_curve import write_size_curve

__all__ = ["RunData", "RunError", "read_runs", "write_figures", "write_page", "write_size_curve"]
_DRAWN = {"write_figures": "figures", "write_size_curve": "size_curve"}


def __getattr__(name: str) -> Any:
    if name not in _DRAWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"hf_drt.report.{_DRAWN[name]}"), name)
