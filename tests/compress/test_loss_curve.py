"""Loss over size: each point is the loss of the model that a compression to that budget by harm makes."""

import copy
import logging

import pytest
import tiny
import torch

from hf_drt.compress import compress, loss_curve

BATCHES = [tiny.batch(rows=8), tiny.batch(rows=16)]
OTHERS = [tiny.batch(rows=12)]


def loss(model, batches):
    with torch.no_grad():
        return sum(model.eval()(**batch).loss.item() for batch in batches) / len(batches)


def test_each_point_is_a_compression_and_the_model_stays_as_it_was():
    model = tiny.llama()
    before = copy.deepcopy(model.state_dict())
    curve = loss_curve(model, [0.5, 0.8, 0.5], iter(BATCHES), evaluation=OTHERS, rank_multiple=2)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [point.share for point in curve.points] == [1.0, 0.8, 0.5]
    assert curve.points[0].loss == pytest.approx(loss(copy.deepcopy(model), OTHERS), rel=1e-6)
    for point in curve.points[1:]:
        smaller = copy.deepcopy(model)
        result = compress(smaller, parameters=point.share, rank_multiple=2, calibration=BATCHES, allocation="harm")
        harm = next(trial for trial in result.trials if trial.allocation == "harm")
        assert point.parameters == harm.parameters <= point.share * curve.points[0].parameters
        same = loss_curve(model, [point.share], BATCHES, rank_multiple=2).points[1]
        assert same.loss == pytest.approx(harm.loss, rel=1e-5)
        if result.allocation == "harm":
            assert point.loss == pytest.approx(loss(smaller, OTHERS), rel=1e-5)
    table = str(curve).splitlines()
    assert table[0].split() == ["share", "parameters", "loss", "rise"]
    assert f"{curve.points[2].loss - curve.points[0].loss:+.4f}" in table[3]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([], r"shares is empty: give budgets in \(0, 1\)"),
        ([0.5, 1.0], r"shares must lie in \(0, 1\), got 1\.0"),
        ([3], r"shares must lie in \(0, 1\), got 3"),
    ],
)
def test_bad_shares_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        loss_curve(tiny.llama(), shares, BATCHES)


def test_batches_without_a_loss_are_refused():
    bert = tiny.bert().bert
    with pytest.raises(ValueError, match="has no loss, by which harm is measured"):
        loss_curve(bert, [0.5], [{"input_ids": tiny.batch("bert")["input_ids"]}])


def test_budgets_below_the_least_ranks_are_left_out_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_drt"):
        curve = loss_curve(tiny.llama(), [0.8, 0.1, 0.2], BATCHES)
    assert [point.share for point in curve.points] == [1.0, 0.8]
    assert (
        "the curve leaves out 0.1, 0.2: at rank 8, the least that rank_multiple allows, the layers hold 0.425"
        in caplog.text
    )
