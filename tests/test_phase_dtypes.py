"""Dtypes of phases in a loop of one's own: what computes in what, and that nothing but that changes with them."""

import copy

import pytest
import tiny
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank
from hf_drt.planning import Paces, TargetLayers, description, measured_paces
from hf_drt.planning.layers import FrozenDict
from hf_drt.precision import autocast, has_bf16_products, slow_dtype

TEXT = "factored/bf16@0 factored/fp32@2 dense/fp32@4 dense@6"


class Loop:
    """A few steps of AdamW, under the controller's autocast."""

    def __init__(self, schedule=TEXT, steps=8, **settings):
        self.model = tiny.llama()
        settings |= {"rank": 4} if "factored" in schedule or "adapter" in schedule else {}
        self.drt = DynamicRank(self.model, DRTConfig(schedule=schedule, **settings), steps)
        self.drt.apply(0)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        self.losses = []

    def run(self, begin=0, end=8, casts=True):
        for step in range(begin, end):
            self.drt.begin_step(step, self.optimizer)
            if casts:
                with self.drt.autocast():
                    loss = self.loss()
            else:
                loss = self.loss()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())
        return self

    def loss(self):
        return self.model(**tiny.batch()).loss


def test_each_phase_computes_in_its_dtype():
    """Seen at a layer; torch's own autocast gives the same bits."""
    loop, seen = Loop(), []
    layer = loop.model.model.layers[0].mlp.down_proj
    for step in range(8):
        loop.drt.begin_step(step, loop.optimizer)
        layer = loop.model.model.layers[0].mlp.down_proj
        handle = layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
        with loop.drt.autocast():
            own = loop.loss()
        handle.remove()
        with torch.autocast("cpu", torch.bfloat16, enabled=step < 2):
            assert torch.equal(own, loop.loss())
        assert loop.drt.dtype == ("bf16" if step < 2 else "fp32" if step < 6 else None)
    assert seen == [torch.bfloat16] * 2 + [torch.float32] * 6


def test_fp32_switches_off_an_autocast_around_it():
    with torch.autocast("cpu", torch.bfloat16):
        with autocast("fp32", "cpu"):
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
        with autocast(None, "cpu"):
            assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["factored", "adapter", "dense"])
def test_a_change_of_dtype_alone_touches_neither_weights_nor_optimizer_nor_rate(form):
    warm = {"rewarmup_steps": 3} if form != "dense" else {}  # which has no change of form
    loop = Loop(f"{form}/fp32@0 {form}/bf16@4 dense@6", **warm)
    loop.run(end=4)
    layers = {name: loop.model.get_submodule(name) for name in loop.drt.targets}
    weights = copy.deepcopy(loop.model.state_dict())
    state = copy.deepcopy(loop.optimizer.state_dict())
    transition = loop.drt.begin_step(4, loop.optimizer)
    assert (transition.phase, transition.layers, transition.truncation_error) == (1, 0, 0.0)
    assert {name: loop.model.get_submodule(name) for name in loop.drt.targets} == layers  # the objects
    torch.testing.assert_close(dict(loop.model.state_dict()), dict(weights), rtol=0, atol=0)
    torch.testing.assert_close(loop.optimizer.state_dict(), state, rtol=0, atol=0)
    assert loop.drt.lr_factor() == 1.0
    with loop.drt.autocast():
        loop.loss().backward()
    loop.run(begin=5, end=7)
    if form != "dense":
        assert loop.drt.lr_factor() < 1  # a change of form warms up anew


def test_a_re_warm_up_goes_on_through_a_change_of_dtype():
    loop = Loop("factored@0 dense/fp32@3 dense/bf16@4", rewarmup_steps=4)
    factors = []
    for step in range(8):
        loop.run(step, step + 1)
        factors.append(loop.drt.lr_factor())
    assert factors == pytest.approx([1, 1, 1, 0.1, 0.325, 0.55, 0.775, 1])


def test_a_loop_that_passes_a_dtype_over_is_refused():
    with pytest.raises(
        ValueError, match=r"phase 'factored/bf16@0' computes in bf16, but drt\.autocast\(\) was not asked"
    ):
        Loop().run(end=2, casts=False)
    Loop("factored@0").run(casts=False)


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_a_loop_resumes_to_the_bit_in_every_phase(step):
    whole = Loop().run()
    first = Loop().run(end=step)
    state = first.drt.state_dict()
    assert state["plan"] == "factored/bf16@0 factored/fp32@2 dense/fp32@4 dense@6"
    other = Loop()
    other.drt.load_state_dict(state, other.optimizer)
    other.model.load_state_dict(first.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    assert other.run(begin=step).losses == whole.losses[step:]
    with pytest.raises(ValueError, match=r"the plan has changed: the state is of 'factored/bf16@0 factored/fp32@2"):
        Loop(TEXT.replace("bf16", "fp32", 1).replace("fp32@2", "bf16@2")).drt.load_state_dict(state)


def test_fp32_is_refused_for_weights_in_fewer_bits():
    with pytest.raises(
        ValueError, match=r"phase 'dense/fp32@1' is in fp32, but .* is in bfloat16, .*Load the model with"
    ):
        DynamicRank(tiny.llama().to(torch.bfloat16), DRTConfig(schedule="factored@0 dense/fp32@50%", rank=4), 2)
    DynamicRank(tiny.llama().to(torch.bfloat16), DRTConfig(schedule="factored/bf16@0", rank=4), 2)


@pytest.mark.parametrize("setting", [{"rewarmup_steps": 2}, {"moments": "project"}])
def test_settings_for_changes_of_form_are_refused_where_dtypes_change_alone(setting):
    with pytest.raises(ValueError, match=r"would have no effect: .*the phases differ in their dtypes alone"):
        DynamicRank(tiny.llama(), DRTConfig(schedule="dense/bf16@0 dense/fp32@50%", **setting), 2)


def test_a_cpu_without_instructions_for_bf16_is_told_of(monkeypatch, caplog):
    for found, slow in (({}, True), ({"amx_bf16": True}, False), ({"avx512_bf16": False, "bf16": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert has_bf16_products() != slow
        assert (slow_dtype(["fp32", "bf16"], "cpu") is not None) == slow
        assert slow_dtype(["bf16"], "cuda") is None
        assert slow_dtype(["fp32", None], "cpu") is None
        caplog.clear()
        Loop(steps=2, schedule="factored/bf16@0").run(end=2)
        assert sum("bf16 will be slow on this CPU" in row.message for row in caplog.records) == slow


# ---- chosen with the rank


def paced(monkeypatch, **table):
    names = {"dense": "dense/fp32", "half": "dense/bf16", "low": "factored/fp32", "low_half": "factored/bf16"}
    paces = Paces(FrozenDict({names[key]: value for key, value in table.items()}))
    monkeypatch.setattr("hf_drt.planning.resolve.measured_paces", lambda *args: paces)


@pytest.mark.parametrize("kinds", [["factored"], ["dense", "adapter"], ["adapter", "factored"]])
def test_the_forms_of_a_schedule_are_measured(kinds):
    config = DRTConfig(schedule="fixed")
    table = measured_paces(TargetLayers.of(tiny.llama(), config), config, kinds, "cpu").table
    assert {name.partition("/")[0] for name in table} == {"dense", *kinds}
    assert table["dense/fp32"] == 1.0
    assert all(0 < pace < float("inf") for pace in table.values())


QUICK = {"dense": 1.0, "half": 0.5, "low": 1.0, "low_half": 0.5}
SLOW = {"dense": 1.0, "low": 1.0}  # bf16 was not measured


def chosen(budget=0.4, **settings):
    config = {"schedule": "auto(precision=auto)", "rank_multiple": 1, "matrix_optimizer": "none", **settings}
    return DynamicRank(tiny.llama(), DRTConfig(budget=budget, **config), 100)


def test_the_budget_of_seconds_chooses_rank_and_dtype_together(monkeypatch):
    paced(monkeypatch, **QUICK)
    quick = chosen()
    paced(monkeypatch, **SLOW)
    slow = chosen()
    assert str(quick.plan) == "factored:0.25/bf16@0"
    assert slow.plan.phases[0].dtype == "fp32"
    assert slow.plan.phases[0].rank < 0.25
    assert slow.plan.phases[0].rank == chosen(schedule="auto").plan.phases[0].rank  # seconds are FLOPs here
    text = "\n".join(description(quick.resolved))
    assert "precision: bf16 from step 0 on (autocast; weights and optimizer stay as they are)" in text
    assert "dtype auto: by a budget of 0.4 of the seconds of dense layers in fp32; seconds of a multiply-add" in text
    assert "dense/fp32 1.00, dense/bf16 0.50, factored/fp32 1.00, factored/bf16 0.50" in text


def test_a_run_goes_on_with_what_was_measured_when_it_began(monkeypatch):
    paced(monkeypatch, **QUICK)
    first = chosen()
    first.apply(0)
    state = first.state_dict()
    assert state["paces"]["factored/bf16"] == 0.5
    paced(monkeypatch, **SLOW)
    later = chosen()
    later.load_state_dict(state)
    assert str(later.plan) == "factored:0.25/bf16@0"
    assert later.state_dict()["layers"] == state["layers"]


def test_seconds_are_multiply_adds_by_their_paces():
    from hf_drt.forms import Adapter, Dense, Factored, LayerShape, flops_of

    shapes = [LayerShape(8, 16), LayerShape(4, 4)]
    paces = Paces(FrozenDict({"dense/fp32": 1.0, "dense/bf16": 0.5, "factored/bf16": 0.75, "adapter/bf16": 2.0}))
    forms = [Factored(2), Dense()]
    by_hand = (3 * flops_of(Factored(2), shapes[0]) * 0.75 + flops_of(Dense(), shapes[1]) * 0.5) / (
        3 * flops_of(Dense(), shapes[0]) + flops_of(Dense(), shapes[1])
    )
    assert paces.seconds(forms, shapes, [(5, 3), (1, 1)], "bf16") == pytest.approx(by_hand)
    assert paces.seconds([Adapter(2, 1.0)], shapes[:1], [(1, 1)], "bf16") == pytest.approx(
        2 * flops_of(Adapter(2, 1.0), shapes[0]) / flops_of(Dense(), shapes[0])
    )
    assert paces.seconds(forms, shapes, [(1, 1), (1, 1)], "fp32") == float("inf")


def test_layers_are_timed_without_a_trace(monkeypatch):
    from hf_drt.planning import paces

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(paces, "ROWS", 4)
    model = tiny.llama()
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    config = DRTConfig(schedule="auto(precision=auto)", budget=1.0, rank_multiple=1, start="scratch")
    drt = DynamicRank(model, config, 100)
    assert set(drt.resolved.paces.table) == {"dense/fp32", "dense/bf16", "factored/fp32", "factored/bf16"}
    assert drt.resolved.paces.table["dense/fp32"] == 1.0
    assert all(pace > 0 for pace in drt.resolved.paces.table.values())
    assert torch.equal(torch.get_rng_state(), rng)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)


def test_a_dtype_is_not_chosen_for_convolutions():
    config = DRTConfig(schedule="auto_late(precision=auto)", start="scratch", include=["layer"], exclude=["shortcut"])
    with pytest.raises(ValueError, match=r"a dtype 'auto' is chosen by the seconds of linear layers, and none of the"):
        DynamicRank(tiny.resnet(), config, 100)
