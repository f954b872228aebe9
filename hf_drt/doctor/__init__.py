"""What holds on the machine it stands on: versions, devices, forms, decompositions, a switch, engines, processes.

Every concern is a :class:`Check` in a registry. A check computes something here and compares it with an independent
computation (float64 on the CPU, dense mathematics, one process, an undisturbed run), so that a machine that nobody has
tried hf_drt on shows by itself what works there.
"""

from hf_drt.doctor.check import CHECKS, Bench, Check, Finding, Result, found, not_tried
from hf_drt.doctor.decompositions import check_decompositions
from hf_drt.doctor.devices import check_devices, device_named
from hf_drt.doctor.engines import check_engines
from hf_drt.doctor.forms import check_forms
from hf_drt.doctor.processes import check_processes
from hf_drt.doctor.reports import Report, chosen, examine
from hf_drt.doctor.switch import check_switch
from hf_drt.doctor.versions import check_versions

__all__ = [
    "CHECKS",
    "Bench",
    "Check",
    "Finding",
    "Report",
    "Result",
    "chosen",
    "device_named",
    "examine",
    "found",
    "not_tried",
]

CHECKS.add("versions", Check("packages against those that were tested", check_versions))
CHECKS.add("devices", Check("the processor and accelerators", check_devices))
CHECKS.add("decompositions", Check("every decomposition against float64", check_decompositions))
CHECKS.add("forms", Check("every form of a layer, forward and backward, against dense in float64", check_forms))
CHECKS.add("switch", Check("changes of form of 100 million parameters: time, memory, function", check_switch))
CHECKS.add("engines", Check("which engines are installed and start", check_engines))
CHECKS.add("processes", Check("two processes: equal bits after switches, and a resume to the bit", check_processes))
