"""What a sweep has found, as tables in Markdown."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median

from hf_drt.sweep.attempt import OUTCOMES, PASSED, Result

# What a cause says in one line, for those that many types share or whose message is long.
SHORT = (
    (r"requires the (\w+) library", r"needs \1, which is not installed"),
    (r"missing the required .forward. function", "no forward pass of its own"),
    (r"parameter inference_session of", "takes a session with the frames of a video"),
    (r"parameters after shrinking", "too large after shrinking"),
    (r"^no result after", "no result in the time allowed"),
    (r"no attribute (\w+Model) \(import", r"\1 is not exported by transformers"),
    (r"If you want to train .ReformerModel", "its backward pass runs in training mode only"),
)


def short(cause: str) -> str:
    """A cause in one line of a table."""
    for pattern, text in SHORT:
        if match := re.search(pattern, cause):
            return match.expand(text)
    cause = re.sub(r"^StrictDataclass\w+: Class validation error for validator '\w+': ", "", cause)
    message, _, place = cause.partition(" (modeling_") if " (modeling_" in cause else (cause, "", "")
    message = message if len(message) <= 100 else message[:97] + "..."
    return f"{message} (modeling_{place}" if place else message


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
        types[short(result.cause)].append(result.model_type)
    rows = sorted(types.items(), key=lambda row: (-len(row[1]), row[0]))
    table = [f"| {outcome}: cause | model types |", "|---|---|"]
    return table + [f"| {cause.replace('|', '/')} | {', '.join(sorted(names))} |" for cause, names in rows]
