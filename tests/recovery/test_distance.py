"""The distance of outputs: against torch.distributions and plain formulas."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, QuestionAnsweringModelOutput

from hf_drt.recovery import distance


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def divergence(y, wanted):
    return kl_divergence(Categorical(logits=wanted), Categorical(logits=y))


def test_of_logits_it_is_the_divergence_in_nats_a_mean_over_positions():
    y, wanted = drawn(2, 5, 11), drawn(2, 5, 11, seed=1)
    found = distance(CausalLMOutput(logits=y), CausalLMOutput(logits=wanted), {})
    assert found.item() == pytest.approx(divergence(y, wanted).mean().item(), rel=1e-5)
    assert distance(CausalLMOutput(logits=y), CausalLMOutput(logits=y), {}).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_is_compared_in_float32():
    y, wanted = drawn(2, 5, 11).bfloat16(), drawn(2, 5, 11, seed=1).bfloat16()
    found = distance({"logits": y}, {"logits": wanted}, {})
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(divergence(y.float(), wanted.float()).mean().item(), rel=1e-5)


def test_padding_does_not_count():
    y, wanted = drawn(2, 5, 11), drawn(2, 5, 11, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = distance({"logits": y}, {"logits": wanted}, {"attention_mask": mask})
    assert found.item() == pytest.approx(divergence(y, wanted)[mask.bool()].mean().item(), rel=1e-5)
    pooled = distance({"logits": y[:, 0]}, {"logits": wanted[:, 0]}, {"attention_mask": mask})  # a logit a sample
    assert pooled.item() == pytest.approx(divergence(y[:, 0], wanted[:, 0]).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    "batch",
    [
        {"decoder_attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])},
        {"labels": torch.tensor([[4, 5, -100], [1, 2, 3]])},
    ],
)
def test_a_decoder_beside_an_encoder_has_a_mask_of_its_own(batch):
    y, wanted = drawn(2, 3, 11), drawn(2, 3, 11, seed=1)
    encoder = {"encoder_last_hidden_state": drawn(2, 3, 4)}
    batch = {"attention_mask": torch.tensor([[0, 1, 1], [0, 1, 1]]), **batch}
    kept = torch.tensor([[True, True, False], [True, True, True]])
    found = distance({"logits": y, **encoder}, {"logits": wanted, **encoder}, batch)
    assert found.item() == pytest.approx(divergence(y, wanted)[kept].mean().item(), rel=1e-5)
    for name in set(batch) - {"attention_mask"}:
        del batch[name]
    found = distance({"logits": y, **encoder}, {"logits": wanted, **encoder}, batch)
    assert found.item() == pytest.approx(divergence(y, wanted).mean().item(), rel=1e-5)


def test_several_logits_add_up():
    start, end, other = drawn(2, 5), drawn(2, 5, seed=1), drawn(2, 5, seed=2)
    outputs = QuestionAnsweringModelOutput(start_logits=start, end_logits=end)
    wanted = QuestionAnsweringModelOutput(start_logits=other, end_logits=other)
    expected = divergence(start, other).mean() + divergence(end, other).mean()
    assert distance(outputs, wanted, {}).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "wrapped",
    [lambda y: y, lambda y: (y,), lambda y: BaseModelOutput(last_hidden_state=y), lambda y: {"logits": y[..., :1]}],
)
def test_other_outputs_go_by_relative_squares(wrapped):
    y, wanted = drawn(2, 5, 3), drawn(2, 5, 3, seed=1)
    found = distance(wrapped(y), wrapped(wanted), None)
    if isinstance(wrapped(y), dict) and "logits" in wrapped(y):  # a regression's
        y, wanted = y[..., :1], wanted[..., :1]
    assert found.item() == pytest.approx(((y - wanted) ** 2).sum().item() / (wanted**2).sum().item(), rel=1e-5)


@pytest.mark.parametrize("nothing", [None, {"loss": torch.ones(())}, ()])
def test_outputs_that_hold_nothing_are_an_error(nothing):
    with pytest.raises(ValueError, match="hold neither logits nor hidden states"):
        distance(nothing, nothing, {})


def test_span_logits_and_logits_of_samples_have_no_padding():
    """As many classes as positions, by chance, and logits whose classes are the positions."""
    y, wanted = drawn(2, 5), drawn(2, 5, seed=1)
    batch = {"attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
    for name in ("logits", "start_logits"):
        found = distance({name: y}, {name: wanted}, batch)
        assert found.item() == pytest.approx(divergence(y, wanted).mean().item(), rel=1e-5)


def test_a_batch_of_padding_alone_is_no_distance():
    y, wanted = drawn(2, 5, 11).requires_grad_(), drawn(2, 5, 11, seed=1)
    found = distance({"logits": y}, {"logits": wanted}, {"attention_mask": torch.zeros(2, 5)})
    found.backward()
    assert found.item() == 0.0
    assert not y.grad.any()


def test_of_labels_that_exclude_none_each_is_a_distribution():
    """A shift of all logits changes nothing of one distribution over the labels, and every label's own."""
    y, wanted = drawn(4, 5), drawn(4, 5, seed=1)
    p, q = wanted.sigmoid(), y.sigmoid()
    expected = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    found = distance({"logits": y}, {"logits": wanted}, {}, "multi_label_classification")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    shifted = distance({"logits": wanted + 2}, {"logits": wanted}, {}, "multi_label_classification")
    assert shifted.item() > 0.1


def test_of_a_regression_of_several_numbers_it_is_relative_squares():
    y, wanted = drawn(4, 5), drawn(4, 5, seed=1)
    found = distance({"logits": y}, {"logits": wanted}, {}, "regression")
    assert found.item() == pytest.approx(((y - wanted) ** 2).sum().item() / (wanted**2).sum().item(), rel=1e-5)


def test_classes_of_a_picture_are_the_second_dimension():
    y, wanted = drawn(2, 7, 3, 4), drawn(2, 7, 3, 4, seed=1)
    found = distance({"logits": y}, {"logits": wanted}, {})
    last = divergence(y.movedim(1, -1), wanted.movedim(1, -1))
    assert found.item() == pytest.approx(last.mean().item(), rel=1e-5)


def test_a_loss_is_no_output():
    y, wanted = drawn(4, 5), drawn(4, 5, seed=1)
    expected = ((y - wanted) ** 2).sum().item() / (wanted**2).sum().item()
    assert distance((torch.ones(()), y), (torch.zeros(()), wanted), {}).item() == pytest.approx(expected, rel=1e-5)
