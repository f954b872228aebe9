"""``hf-drt plan`` of phases with dtypes: what each computes in, what that keeps, and what is slow here."""

import json

import tiny
import torch

from hf_drt import DRTConfig, DynamicRank
from hf_drt.simulate import batch_spec, estimate_run, simulate_step


def test_the_plan_tells_the_dtype_of_each_phase_and_what_is_slow(hf_drt, configured, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    schedule = ("--schedule", "factored:8/bf16@0 dense/fp32@50%", "--batch-size", 2, "--seq-length", 8)
    told = json.loads(hf_drt("plan", configured("llama"), *schedule, "--json").out)
    assert [phase["form"] for phase in told["phases"]] == ["factored/bf16", "dense/fp32"]
    assert told["plan"] == "factored:8/bf16@0 dense/fp32@500"
    assert "precision: bf16 from step 0 on, fp32 from step 500 on (autocast; weights and optimizer st" in str(
        told["decided"]
    )
    assert any(text.startswith("bf16 will be slow on this CPU") for text in told["warnings"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    told = json.loads(hf_drt("plan", configured("llama"), *schedule, "--json").out)
    assert not any("slow" in text for text in told["warnings"])


def test_a_phase_keeps_the_activations_of_its_dtype():
    with torch.device("meta"):
        model = tiny.llama()
    batch = batch_spec(model, 2, 8)
    alone = {bf16: simulate_step(model, batch, autocast=torch.bfloat16 if bf16 else None) for bf16 in (True, False)}
    drt = DynamicRank(model, DRTConfig(schedule="dense/bf16@0 dense/fp32@40% dense@80%"), 10)
    for run, own in ((None, False), (torch.bfloat16, True)):
        phases = estimate_run(drt, batch, autocast=run).phases
        assert [phase.step.activations for phase in phases] == [alone[x].activations for x in (True, False, own)]
    assert alone[True].activations != alone[False].activations  # a tiny model's casts are larger than what they save


def test_an_engine_with_a_policy_of_its_own_is_refused(hf_drt, configured):
    schedule = ("--schedule", "factored:8/bf16@0", "--batch-size", 2, "--seq-length", 8)
    result = hf_drt("plan", configured("llama"), *schedule, "--processes", 2, "--engine", "fsdp2")
    assert result.code == 2
    assert "casts by a policy of its own, and phases of 'factored:8/bf16@0' have dtypes. Take" in " ".join(
        result.err.split()
    )
