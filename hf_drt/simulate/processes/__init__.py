"""A plan on many processes, on paper: memory, bytes sent and seconds by engine, and what a switch costs."""

from hf_drt.simulate.processes.estimate import OnProcesses, PhaseOnProcesses, on_processes
from hf_drt.simulate.processes.inventory import Entry, Inventory, inventory
from hf_drt.simulate.processes.layouts import LAYOUTS, Held, Layout, layout_for
from hf_drt.simulate.processes.links import MACHINES, Link, Machine, machine_for
from hf_drt.simulate.processes.ring import KINDS, Collective, Ring
from hf_drt.simulate.processes.switching import Job, Switch, jobs_of, switch

__all__ = [
    "KINDS",
    "LAYOUTS",
    "MACHINES",
    "Collective",
    "Entry",
    "Held",
    "Inventory",
    "Job",
    "Layout",
    "Link",
    "Machine",
    "OnProcesses",
    "PhaseOnProcesses",
    "Ring",
    "Switch",
    "inventory",
    "jobs_of",
    "layout_for",
    "machine_for",
    "on_processes",
    "switch",
]
