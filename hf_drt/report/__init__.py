"""What a run did, for people to look at: from its folder to one HTML page and to pictures.

Imports run one way: run_files, clock -> run_data -> tables -> page, figures. Only figures needs matplotlib: it is
imported when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from hf_drt.report.page import write_page
from hf_drt.report.run_data import RunData, read_runs
from hf_drt.report.run_files import RunError

if TYPE_CHECKING:
    from hf_drt.report.figures import write_figures

__all__ = ["RunData", "RunError", "read_runs", "write_figures", "write_page"]


def __getattr__(name: str) -> Any:
    if name != "write_figures":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_drt.report.figures import write_figures

    return write_figures
