"""A switch on many processes: shared out as the engines do it, and its seconds by hand."""

from dataclasses import replace

import pytest
import tiny
import torch

from hf_drt import Dense, Factored
from hf_drt.engines import shares
from hf_drt.simulate import MACHINES, layout_for
from hf_drt.simulate.processes import inventory, jobs_of, switch
from hf_drt.simulate.processes.layouts import fewer
from hf_drt.targets import find_targets
from hf_drt.transition.change import empty_forms

# One k^3 a second, and products and links for nothing.
SLOW = replace(
    MACHINES["h100"], decomposition=1.0, flops={"float32": 1e30}, **{
        name: replace(MACHINES["h100"].node, bandwidth=1e30, latency=0.0) for name in ("node", "network")
    },
)  # fmt: skip


def llama():
    with torch.device("meta"):
        return tiny.llama()


def deflation():
    model = llama()
    return model, jobs_of(model, dict.fromkeys(find_targets(model).targets, Factored(4)), inventory(model))


def test_all_layers_of_one_process_one_after_the_other():
    model, jobs = deflation()
    alone = switch(jobs, inventory(model), fewer(layout_for("ddp", 4), 1), SLOW, "float32")
    assert (alone.layers, alone.decomposed, alone.busiest) == (14, 14, 14)
    assert alone.decompositions == pytest.approx(14 * 32**3)
    assert alone.sent == alone.gathers == alone.broadcasts == 0


@pytest.mark.parametrize("count", [2, 4, 8, 64])
def test_the_most_loaded_process_decides(count):
    model, jobs = deflation()
    found = switch(jobs, inventory(model), layout_for("ddp", count), SLOW, "float32")
    owners = shares([job.cost for job in jobs], count)
    most = max(owners.count(owner) for owner in owners)
    assert found.busiest == most
    assert found.decompositions == pytest.approx(most * 32**3)


def test_in_parts_all_wait_for_the_costliest_of_a_round():
    model, jobs = deflation()
    jobs = [replace(job, cost=float(i % 3), order=i % 3) for i, job in enumerate(jobs)]
    owners = shares([job.cost for job in jobs], 2)
    queues = [[job.order**3 for job, owner in zip(jobs, owners, strict=True) if owner == k] for k in (0, 1)]
    length = max(map(len, queues))
    padded = [queue + [0] * (length - len(queue)) for queue in queues]
    found = switch(jobs, inventory(model), layout_for("fsdp2", 2), SLOW, "float32")
    assert found.decompositions == pytest.approx(sum(map(max, zip(*padded, strict=True))))
    assert found.decompositions >= switch(jobs, inventory(model), layout_for("ddp", 2), SLOW, "float32").decompositions


def test_what_is_sent():
    model, jobs = deflation()
    results = sum(4 * (4 * (out + inn) + 4 + 1) for out, inn in 2 * ([(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)]))
    empty_forms(model, dict.fromkeys(find_targets(model).targets, Factored(4)))
    after = inventory(model)
    low = sum(entry.nbytes for entry in after.entries) + after.buffers
    whole = sum(4 * out * inn for out, inn in 2 * ([(32, 32)] * 4 + [(64, 32)] * 2 + [(32, 64)]))
    ddp = switch(jobs, after, layout_for("ddp", 4), SLOW, "float32")
    assert ddp.sent == pytest.approx((results + low) * 3 / 4)  # and the new model, as DDP's constructor has it
    fsdp2 = switch(jobs, after, layout_for("fsdp2", 4), SLOW, "float32")
    assert fsdp2.sent == pytest.approx((results + 2 * whole) * 3 / 4)
    carried = switch(jobs, after, layout_for("fsdp2", 4), SLOW, "float32", state=2.0)
    assert carried.sent == pytest.approx((results + 4 * whole) * 3 / 4)


def test_an_inflation_decomposes_nothing_and_merges_everywhere():
    model = llama()
    names = find_targets(model).targets
    empty_forms(model, dict.fromkeys(names, Factored(4)))
    jobs = jobs_of(model, dict.fromkeys(names, Dense()), inventory(model))
    machine = replace(SLOW, flops={"float32": 1.0}, utilisation=1.0)
    found = switch(jobs, inventory(model), layout_for("fsdp2", 4), machine, "float32")
    assert (found.decomposed, found.decompositions) == (0, 0)
    assert found.merges == pytest.approx(sum(2 * 4 * o * i for o, i in 2 * ([(32, 32)] * 4 + [(64, 32)] * 3)))


def test_factors_are_decomposed_as_they_are():
    model = llama()
    names = find_targets(model).targets
    empty_forms(model, dict.fromkeys(names, Factored(4)))
    jobs = jobs_of(model, dict.fromkeys(names, Factored(2)), inventory(model))
    assert {job.order for job in jobs} == {4}
    assert not any(job.merge for job in jobs)
