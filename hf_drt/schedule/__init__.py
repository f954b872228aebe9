"""From one line of text to integer phases: Schedule (as written) -> Plan (update steps)."""

from hf_drt.schedule.boundary import Boundary, Run, lr_drops
from hf_drt.schedule.counts import whole_number
from hf_drt.schedule.dtypes import AUTO, DTYPES, recasts, with_dtype
from hf_drt.schedule.form_text import form_text
from hf_drt.schedule.parts import LAST, LOW_RANK, MIXED, NEXT, Group, Part
from hf_drt.schedule.plan import Kind, Phase, Plan
from hf_drt.schedule.presets import PRESETS, Follows, Preset, preset_rows, register
from hf_drt.schedule.schedule import Entry, Schedule
from hf_drt.schedule.timeline import BLOCKS, LETTERS, FormSpan, Span, draw_timeline, spans, timeline, timelines
from hf_drt.schedule.trigger import Check, Trigger
from hf_drt.schedule.turns import Turns, could_become, provisional
from hf_drt.schedule.windows import Windows

__all__ = [
    "AUTO",
    "BLOCKS",
    "DTYPES",
    "LAST",
    "LETTERS",
    "LOW_RANK",
    "MIXED",
    "NEXT",
    "PRESETS",
    "Boundary",
    "Check",
    "Entry",
    "Follows",
    "FormSpan",
    "Group",
    "Kind",
    "Part",
    "Phase",
    "Plan",
    "Preset",
    "Run",
    "Schedule",
    "Span",
    "Trigger",
    "Turns",
    "Windows",
    "could_become",
    "draw_timeline",
    "form_text",
    "lr_drops",
    "preset_rows",
    "provisional",
    "recasts",
    "register",
    "spans",
    "timeline",
    "timelines",
    "whole_number",
    "with_dtype",
]
