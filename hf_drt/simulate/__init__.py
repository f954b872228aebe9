"""What a run costs before it runs: FLOPs and memory of the whole model, phase by phase, without a weight."""

from hf_drt.simulate.batch import BatchSpec, batch_spec
from hf_drt.simulate.counter import StepCounter
from hf_drt.simulate.fitting import RATIOS, Candidate, Space, Trial, fitting
from hf_drt.simulate.optimizer import optimizer_bytes
from hf_drt.simulate.processes import (
    KINDS,
    LAYOUTS,
    MACHINES,
    Layout,
    Machine,
    OnProcesses,
    PhaseOnProcesses,
    Switch,
    layout_for,
    machine_for,
    on_processes,
)
from hf_drt.simulate.proposal import Layer, Proposal, propose
from hf_drt.simulate.run import LayerEstimate, PhaseEstimate, RunEstimate, estimate_run
from hf_drt.simulate.step import SimulationError, StepCost, simulate_step
from hf_drt.simulate.step_costs import StepCosts

__all__ = [
    "KINDS",
    "LAYOUTS",
    "MACHINES",
    "RATIOS",
    "BatchSpec",
    "Candidate",
    "Layer",
    "LayerEstimate",
    "Layout",
    "Machine",
    "OnProcesses",
    "PhaseEstimate",
    "PhaseOnProcesses",
    "Proposal",
    "RunEstimate",
    "SimulationError",
    "Space",
    "StepCost",
    "StepCosts",
    "StepCounter",
    "Switch",
    "Trial",
    "batch_spec",
    "estimate_run",
    "fitting",
    "layout_for",
    "machine_for",
    "on_processes",
    "optimizer_bytes",
    "propose",
    "simulate_step",
]
