"""What a sweep has found, as tables in Markdown."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median

from hf_drt.sweep.attempt import OUTCOMES, PASSED, Result


def summary(results: Sequence[Result]) -> str:
    """Outcomes counted; then every type that has not passed, with its cause, equal causes in one row."""
    counts = Counter(result.outcome for result in results)
    lines = ["| outcome | model types |", "|---|---|"]
    lines += [f"| {outcome} | {counts[outcome]} |" for outcome in OUTCOMES]
    lines += [f"| all | {len(results)} |", ""]
    seconds = [result.seconds for result in results]
    lines.append(f"median {median(seconds):.1f} s a type, {sum(seconds):.0f} s in all")
    for outcome in OUTCOMES:
        if outcome != PASSED and counts[outcome]:
            lines += ["", *_causes(outcome, [r for r in results if r.outcome == outcome])]
    return "\n".join(lines)


def _causes(outcome: str, results: Sequence[Result]) -> list[str]:
    types = defaultdict(list)
    for result in results:
        types[result.cause].append(result.model_type)
    rows = sorted(types.items(), key=lambda row: (-len(row[1]), row[0]))
    table = [f"| {outcome}: cause | model types |", "|---|---|"]
    return table + [f"| {cause.replace('|', '/')} | {', '.join(sorted(names))} |" for cause, names in rows]
