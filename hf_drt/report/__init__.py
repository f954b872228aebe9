"""What a run did, for people to look at: from its folder to one HTML page and to pictures.

Imports run one way: run_files, clock -> run_data -> tables -> page, figures. Only figures needs matplotlib."""

from hf_drt.report.figures import write_figures
from hf_drt.report.page import write_page
from hf_drt.report.run_data import RunData, read_runs
from hf_drt.report.run_files import RunError

__all__ = [
    "RunData",
    "RunError",
    "read_runs",
    "write_figures",
    "write_page",
]
