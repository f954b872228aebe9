"""What a sweep has found, as tables in Markdown."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median

from tests.sweep.attempt import NOTHING, OUTCOMES, PASSED, Result
from tests.sweep.catalog import module_of

MOST = 40  # names in one row of a table
# What a cause says in one line, for those that many types share or whose message is long.
SHORT = (
    (r"requires the (\w+) library", r"needs \1, which is not installed"),
    (r"missing the required .forward. function", "no forward pass of its own"),
    (r"parameter inference_session of", "takes a session with the frames of a video"),
    (r"parameters after shrinking", "too large after shrinking"),
    (r"^no result after", "no result in the time allowed"),
    (r"Field 'backbone' with value PosixPath", "its from_pretrained takes a name of timm, not a folder"),
    (r"no attribute (\w+Model) \(import", r"\1 is not exported by transformers"),
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
    """What the sweep has found, as docs/architectures.md shows it.

    Outcomes counted; every type that has not passed, with its cause, equal causes in one row; the modules that the
    types belong to; and the layers that stay dense.
    """
    counts = Counter(result.outcome for result in results)
    lines = ["| outcome | model types |", "|---|---|"]
    lines += [f"| {outcome} | {counts[outcome]} |" for outcome in OUTCOMES]
    lines += [f"| all | {len(results)} |", ""]
    seconds = [result.seconds for result in results]
    lines.append(f"median {median(seconds):.1f} s a type, {sum(seconds):.0f} s in all")
    for outcome in OUTCOMES:
        if outcome != PASSED and counts[outcome]:
            lines += ["", *_causes(outcome, [r for r in results if r.outcome == outcome])]
    passed = [result for result in results if result.outcome == PASSED]
    if passed:
        lines += ["", _reached(passed)]
    lines += ["", _modules(results)]
    if any(result.facts["dense"] for result in passed):
        lines += ["", *_stayed_dense(passed)]
    return "\n".join(lines)


def _reached(passed: Sequence[Result]) -> str:
    facts = [result.facts for result in passed]
    targets, reached = (sum(f[name] for f in facts) for name in ("targets", "reached"))
    text, double = sum(f["variant"]["text_only"] for f in facts), sum(f["dtype"] == "float64" for f in facts)
    without = ", ".join(result.model_type for result in passed if not result.facts["reached"])
    return (
        f"Passed: {len(facts)} types with {targets:,} target layers, of which {reached:,} got gradients; {text} of the "
        f"types were fed text alone, {double} compared in float64. The largest relative difference of outputs was "
        f"{max(f['error'] for f in facts):.1e}. Types in which no target layer got gradients: {without or 'none'}."
    )


def _modules(results: Sequence[Result]) -> str:
    """Modules of transformers counted by their best outcome, and those that have neither passed nor nothing to do."""
    outcomes = defaultdict(set)
    for result in results:
        outcomes[module_of(result.model_type)].add(result.outcome)
    passed = [name for name, found in outcomes.items() if PASSED in found]
    empty = [name for name, found in outcomes.items() if found == {NOTHING}]
    others = sorted(outcomes.keys() - {*passed, *empty})
    return (
        f"By module of transformers, which the parts of a model share: of {len(outcomes)}, {len(passed)} have a type "
        f"that has passed, {len(empty)} have nothing to select; the others: {', '.join(others) or 'none'}."
    )


def _stayed_dense(passed: Sequence[Result]) -> list[str]:
    types = defaultdict(list)
    for result in passed:
        for reason in result.facts["dense"]:
            types[reason].append(result.model_type)
    rows = sorted(types.items(), key=lambda row: (-len(row[1]), row[0]))
    head = "Layers inside blocks that stay dense, by reason, in types that have passed:"
    shown = [
        (reason, ", ".join(sorted(names)) if len(names) <= MOST else f"{len(names)} types") for reason, names in rows
    ]
    return [head, "", "| reason | model types |", "|---|---|", *(f"| {reason} | {names} |" for reason, names in shown)]


def _causes(outcome: str, results: Sequence[Result]) -> list[str]:
    types = defaultdict(list)
    for result in results:
        types[short(result.cause)].append(result.model_type)
    rows = sorted(types.items(), key=lambda row: (-len(row[1]), row[0]))
    table = [f"| {outcome}: cause | model types |", "|---|---|"]
    return table + [f"| {cause.replace('|', '/')} | {', '.join(sorted(names))} |" for cause, names in rows]
