"""The checks one after the other: which ones, and what they raise as a finding like any other."""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from hf_drt.doctor.check import CHECKS, Bench, Finding, Result, Value, raised
from hf_drt.doctor.private import scrubbed


@dataclass(frozen=True)
class Report:
    """What one check found.

    Attributes:
        name: Of the check.
        findings: In order; without paths and the names of the user and of the machine.
        seconds: That it took.
    """

    name: str
    findings: tuple[Finding, ...]
    seconds: float

    def count(self, result: Result) -> int:
        """Number of findings that came out so."""
        return sum(finding.result is result for finding in self.findings)


def chosen(only: Sequence[str] = (), left_out: Sequence[str] = ()) -> list[str]:
    """Names of the checks to make, in their own order.

    Raises:
        ValueError: A name is not that of a check, or none is left.
    """
    for name in (*only, *left_out):
        CHECKS.find(name)
    names = [name for name in CHECKS if (not only or name in only) and name not in left_out]
    if not names:
        raise ValueError(f"no check is left: {', '.join(only or CHECKS)} without {', '.join(left_out)}.")
    return names


def examine(name: str, bench: Bench) -> Report:
    """Make one check. An error of its own is a finding that did not hold, and ends this check alone."""
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        findings = tuple(map(_public, _guarded(name, bench)))
    return Report(name, findings, time.perf_counter() - started)


def _guarded(name: str, bench: Bench) -> Iterator[Finding]:
    try:
        yield from CHECKS[name].examine(bench)
    except Exception as error:  # whatever a device or a library raises
        yield raised(f"the rest of {name}", error)


def _public(finding: Finding) -> Finding:
    values: dict[str, Value] = {
        key: scrubbed(value) if isinstance(value, str) else value for key, value in finding.values.items()
    }
    return replace(finding, what=scrubbed(finding.what), seen=scrubbed(finding.seen), values=values)
