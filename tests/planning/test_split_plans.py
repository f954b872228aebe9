"""Plans whose adapters are split: what they cost, what they say of it, and what is refused."""

import pytest
import tiny

from hf_drt import DRTConfig, DynamicRank
from hf_drt.forms import Adapter, Dense, Factored, LayerShape, forward_of
from hf_drt.planning import description
from hf_drt.planning.cost import plan_cost
from hf_drt.schedule import Run, Schedule

PLAN = "drift(first=0.375,last=0.125,shape=linear,levels=3)"


def controller(schedule=PLAN, model=None, **settings) -> DynamicRank:
    settings = {"rank_multiple": 4} | settings
    return DynamicRank(model or tiny.llama(), DRTConfig(schedule=schedule, **settings), max_steps=100)


def test_an_adapter_is_never_cheaper_than_dense_in_the_forward_pass():
    shape = LayerShape(96, 64)
    for rank in (1, 8, 32):
        low = rank * (96 + 64)
        costs = [forward_of(form, shape) for form in (Dense(), Factored(rank), Adapter(rank, float(rank), "split"))]
        assert costs == [96 * 64, low, 96 * 64 + low]
    kernel = LayerShape(16, 12 * 9, (3, 3), (2, 2))
    assert forward_of(Adapter(4, 4.0, "split"), kernel) == 16 * 108 + 4 * (16 + 108)


def test_the_cost_of_a_plan_by_hand():
    """Two layers in ranks 12 and 4: forward ``1 + r (m + n) / (m n)``, all of it ``2/3 + r (m + n) / (m n)``."""
    plan = Schedule.parse("adapter:12@0 adapter:4@25%").resolve(Run(100))
    shapes, forms = [LayerShape(64, 64), LayerShape(64, 32)], [[Adapter(r, r, "split")] * 2 for r in (12, 4)]
    cost = plan_cost(plan, shapes, forms)
    share = [r * (128 + 96) / (64 * 64 + 64 * 32) for r in (12, 4)]
    assert [phase.forward for phase in cost.phases] == pytest.approx([1 + low for low in share])
    assert [phase.flops for phase in cost.phases] == pytest.approx([2 / 3 + low for low in share])
    assert [phase.parameters for phase in cost.phases] == pytest.approx(share)
    assert cost.forward == pytest.approx(1 + 0.25 * share[0] + 0.75 * share[1])
    assert ([phase.changed for phase in cost.phases], cost.switches) == ([0, 2], 1)


def test_the_plan_says_what_it_does_not_save_and_how_often_it_switches():
    drt = controller()
    lines = description(drt.resolved)
    assert f"forward pass: {drt.cost().forward:.3f} of dense, and in no phase below it" in " ".join(lines)
    assert drt.cost().forward > 1
    assert lines[-1] == "rank levels: 3, by 2 switches"
    assert "adapter_init: split (by the preset drift)" in lines
    assert "moments: project (by the preset drift)" in lines
    other = description(controller("factored@0 adapter@50%").resolved)
    assert not any(line.startswith(("forward pass", "rank levels")) for line in other)


def test_a_factored_phase_beside_is_below_dense_and_the_plan_does_not_deny_it():
    drt = controller("adapter:8@0 factored:4@50% adapter:4@80%", adapter_init="split", rank_multiple=8)
    assert min(phase.forward for phase in drt.cost().phases) < 1
    (line,) = (line for line in description(drt.resolved) if line.startswith("forward pass"))
    assert line == f"forward pass: {drt.cost().forward:.3f} of dense"


def test_the_products_are_not_scaled_whatever_the_rank():
    for index in range(3):
        assert {form.scaling for form in controller().forms(index).values()} == {1.0}
    with pytest.raises(ValueError, match=r"adapter_alpha is 8.0, .*adapter_init=split are not scaled.*adapter_lr_sca"):
        controller(adapter_alpha=8.0)
    assert controller(adapter_init="principal", adapter_alpha=8.0).forms(0)


def test_levels_that_round_to_the_same_ranks_are_told(caplog):
    drt = controller("drift(first=0.375,last=0.25,shape=linear,levels=5)")
    assert drt.cost().switches == 1
    assert "3 of the 4 changes of phase change no layer, since ranks are rounded to multiples of 4" in caplog.text
    assert description(drt.resolved)[-1] == "rank levels: 2, by 1 switch"


def test_a_change_of_dtype_alone_is_no_level_that_rounds_away(caplog):
    controller("adapter:8/bf16@0 adapter:8/fp32@50% dense/fp32@80%", adapter_init="split", rank_multiple=8)
    assert "change no layer" not in caplog.text


def test_full_rank_at_one_end_is_allowed_and_throughout_refused():
    assert controller("drift(first=0.9,last=0.125,levels=3)").cost().phases[0].parameters == 1
    with pytest.raises(ValueError, match=r"phase 'adapter:0\.9@0' leaves all 14 layers dense: their ranks reach break"):
        controller("drift(first=0.9,last=0.8,levels=3)")
    with pytest.raises(ValueError, match=r"phase 'adapter:0\.9@0' leaves all 14 layers dense"):
        controller("adapter:0.9@0 adapter:0.125@50%", adapter_init="principal")


@pytest.mark.parametrize("decomposition", ["tucker", "cp"])
def test_products_of_other_tensors_cannot_be_split(decomposition):
    message = (
        rf"divides a product U V, and decomposition='{decomposition}' is of other tensors\. Use decomposition='svd'"
    )
    with pytest.raises(
        ValueError, match=rf"adapter_init='split' \(by the preset drift\) {message}, or adapter_init='pri"
    ):
        controller(model=tiny.resnet(), decomposition=decomposition)
    with pytest.raises(ValueError, match=rf"adapter_init='split' {message}"):
        controller("adapter@0 dense@50%", tiny.resnet(), decomposition=decomposition, adapter_init="split")
    rank_in = 3 if decomposition == "tucker" else None
    with pytest.raises(
        ValueError, match=r"init 'split' divides a product of two matrices, .*Use 'svd', or init 'princ"
    ):
        Adapter(4, 4.0, "split", decomposition, rank_in)
    assert controller(model=tiny.resnet(), decomposition=decomposition, adapter_init="principal").forms(0)


def test_a_run_too_short_for_its_levels_is_refused_with_a_way_out():
    with pytest.raises(
        ValueError, match=r"phase boundaries cross: .* for more steps, or take fewer stages or levels\."
    ):
        Schedule.parse("drift(levels=20)").resolve(Run(10))
