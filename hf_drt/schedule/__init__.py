"""From one line of text to integer phases: Schedule (as written) -> Plan (update steps)."""

from hf_drt.schedule.boundary import Boundary, Run, lr_drops
from hf_drt.schedule.counts import whole_number
from hf_drt.schedule.plan import Phase, Plan, form_text
from hf_drt.schedule.presets import PRESETS, Follows, Preset, preset_rows, register
from hf_drt.schedule.schedule import Entry, Schedule
from hf_drt.schedule.timeline import BLOCKS, LETTERS, draw_timeline, timeline
from hf_drt.schedule.trigger import Check, Trigger
from hf_drt.schedule.windows import Windows

__all__ = [
    "BLOCKS",
    "LETTERS",
    "PRESETS",
    "Boundary",
    "Check",
    "Entry",
    "Follows",
    "Phase",
    "Plan",
    "Preset",
    "Run",
    "Schedule",
    "Trigger",
    "Windows",
    "draw_timeline",
    "form_text",
    "lr_drops",
    "preset_rows",
    "register",
    "timeline",
    "whole_number",
]
