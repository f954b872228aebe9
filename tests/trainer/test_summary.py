"""The facts behind a model card, of a controller with or without a schedule's text."""

import tiny

from hf_drt import DRTConfig, DynamicRank, Phase, Plan
from hf_drt.trainer.summary import run_summary


def test_a_plan_made_by_hand_is_told_in_place_of_a_schedule():
    plan = Plan((Phase(0, "factored"), Phase(2, "dense")), 4)
    controller = DynamicRank(tiny.llama(), DRTConfig(rank=4), plan=plan)
    controller.apply(0)
    history = [{"step": 0, "drt_phase": 0, "drt_trainable_parameters": 7}]
    summary = run_summary(controller, history, "native", "user/name")
    assert summary.schedule == "factored@0 dense@2"
    assert summary.settings == {"rank": 4}
    assert [(p.kind, p.start, p.end, p.ranks, p.trainable) for p in summary.phases] == [
        ("factored", 0, 2, (4, 4), 7), ("dense", 2, 4, None, None),
    ]  # fmt: skip
    assert (summary.layers, summary.model_class) == (14, "LlamaForCausalLM")
