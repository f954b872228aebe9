"""What the end of training needs for a dense model in place, and what happens where there is no room for it."""

import pytest
import tiny
import torch

from hf_drt import DRTConfig, DynamicRank
from hf_drt.trainer.delivery import may_become_dense


@pytest.mark.parametrize(
    ("schedule", "dtype", "bytes_per_weight"),
    [("factored@0 frozen@1", "bfloat16", 2), ("factored@0 frozen@1", None, 0), ("dense@0 factored@1", None, 4)],
    ids=["frozen in fewer bits", "frozen", "factored"],
)
def test_a_model_without_room_for_its_dense_weights_keeps_its_form(
    monkeypatch, caplog, schedule, dtype, bytes_per_weight
):
    model = tiny.llama()
    drt = DynamicRank(model, DRTConfig(schedule=schedule, rank=4, frozen_dtype=dtype), 2)
    drt.apply(0)
    drt.apply(1)
    asked, empty = [], torch.empty

    def full(*size, **options):
        if options.get("dtype") != torch.uint8:
            return empty(*size, **options)
        asked.append(size[0])
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        assert may_become_dense(model) is (not bytes_per_weight)
    weights = sum(shape[0] * shape[1] for shape in drt.targets.values())
    assert asked == ([bytes_per_weight * weights] if bytes_per_weight else [])
    assert ("there is no memory for its dense weights" in caplog.text) is bool(bytes_per_weight)
    assert may_become_dense(model)
