"""Attention with a layer for each projection, against ``nn.MultiheadAttention`` itself, in float64."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from hf_drt import Dense, Factored, convert, form_of
from hf_drt.forms import SplitAttention, dense_key, is_projection, layer_of

N, L, S, E, HEADS = 2, 4, 5, 12, 3
SETTINGS = {
    "plain": {},
    "no bias": {"bias": False},
    "batch first": {"batch_first": True},
    "widths of their own": {"kdim": 7, "vdim": 6},
    "bias_k and bias_v": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "batch_first": True},
    "all": {"kdim": 7, "vdim": 6, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
CAUSAL = torch.ones(L, S, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[False] * S, [False] * (S - 2) + [True] * 2])
MASKS = {
    "none": {},
    "boolean": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "added": {"attn_mask": -2.0 * CAUSAL.double(), "key_padding_mask": -3.0 * PADDING.double()},
    "of each head": {"attn_mask": CAUSAL.repeat(N * HEADS, 1, 1)},
    "causal": {"attn_mask": CAUSAL, "is_causal": True},
    "causal and padding": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "is_causal": True},
}


def packed(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(E, HEADS, **options).double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.3)
    return attention


def inputs(attention: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    torch.manual_seed(1)
    sizes = ((L, E), (S, attention.kdim), (S, attention.vdim))
    found = [torch.randn(N, *size, dtype=torch.double) for size in sizes]
    if not batched:
        return [x[0].requires_grad_() for x in found]
    return [(x if attention.batch_first else x.transpose(0, 1)).detach().requires_grad_() for x in found]


def gradients(attention: nn.MultiheadAttention) -> dict[str, Tensor]:
    """Of the packed parameters, by name."""
    state = {name: p.grad for name, p in attention.named_parameters()}
    if isinstance(attention, SplitAttention):
        attention.pack(state, "")
    return state


@settings
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("need_weights", "average"), [(False, True), (True, True), (True, False)])
def test_outputs_weights_and_gradients_are_those_of_torch(options, masks, need_weights, average):
    attention = packed(**options)
    split = SplitAttention(attention)
    split.out_proj = copy.deepcopy(attention.out_proj)
    for leaf in ("bias_k", "bias_v"):
        setattr(split, leaf, copy.deepcopy(getattr(attention, leaf)))
    results = []
    for module in (attention, split):
        given = inputs(module)
        y, weights = module(*given, **masks, need_weights=need_weights, average_attn_weights=average)
        (y.sin().sum() + (weights.square().sum() if need_weights else 0)).backward()
        results.append(({"y": y, "weights": weights, **dict(enumerate(x.grad for x in given))}, gradients(module)))
    (expected, by_torch), (found, ours) = results
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])
    assert ours.keys() == by_torch.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], by_torch[name])


@settings
def test_one_sequence_without_a_batch(options):
    attention = packed(**options)
    given = inputs(attention, batched=False)
    for need_weights in (False, True):
        masks = {"attn_mask": CAUSAL, "key_padding_mask": PADDING[1], "need_weights": need_weights}
        for expected, found in zip(attention(*given, **masks), SplitAttention(attention)(*given, **masks), strict=True):
            torch.testing.assert_close(found, expected)


def test_dropout_is_drawn_in_training_alone_and_from_torchs_generator():
    attention = SplitAttention(packed(dropout=0.5))
    given = inputs(attention)
    for need_weights in (False, True):
        torch.manual_seed(3)
        first = attention(*given, need_weights=need_weights)[0]
        assert not torch.equal(attention(*given, need_weights=need_weights)[0], first)
        torch.manual_seed(3)
        assert torch.equal(attention(*given, need_weights=need_weights)[0], first)
    expected = packed(dropout=0.5).eval()(*given)[0]
    torch.testing.assert_close(attention.eval()(*given)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_causal": True}, "attn_mask is None. Pass the mask too"),
        ({"attn_mask": CAUSAL.long()}, r"attn_mask must be boolean \(True is left out\) or floating-point"),
        ({"attn_mask": CAUSAL.T}, r"attn_mask must be of shape \(L, S\) = \(4, 5\) or \(N heads, L, S\) = \(6, 4, 5\)"),
        ({"key_padding_mask": PADDING.T}, r"key_padding_mask must be of shape \(N, S\) = \(2, 5\), got \(5, 2\)"),
        ({"query": torch.randn(L, N, 3)}, r"must have \(12, 12, 12\) features, got \(3, 12, 12\)"),
        ({"value": torch.randn(S + 1, N, E)}, "key and value of one length"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    attention = SplitAttention(packed().float())
    given = dict(zip(("query", "key", "value"), (x.float() for x in inputs(attention)), strict=True))
    with pytest.raises(ValueError, match=message):
        attention(**(given | change))


@settings
def test_the_state_dict_is_the_packed_ones_and_loads_both_ways(options):
    attention = packed(**options)
    split, state = SplitAttention(attention), attention.state_dict()
    assert {k: v.tolist() for k, v in split.state_dict().items()} == {k: v.tolist() for k, v in state.items()}
    other = {name: torch.randn_like(value) for name, value in state.items()}
    split.load_state_dict(other)
    attention.load_state_dict(split.state_dict())
    assert all(torch.equal(value, other[name]) for name, value in attention.state_dict().items())
    joined = split.joined()
    assert type(joined) is nn.MultiheadAttention
    assert [name for name, _ in joined.named_parameters()] == [name for name, _ in attention.named_parameters()]
    given = inputs(attention)
    assert torch.equal(joined(*given)[0], attention(*given)[0])


def test_with_a_layer_in_low_rank_a_packed_module_cannot_load_the_state_and_keep_random_weights():
    split = SplitAttention(packed())
    split.k_proj = convert(split.k_proj, Factored(2)).module
    state = split.state_dict()
    assert state["in_proj_weight"].shape == (0, E)
    assert {"q_proj.weight", "k_proj.U", "k_proj.V", "v_proj.weight"} <= state.keys()
    with pytest.raises(RuntimeError, match="size mismatch for in_proj_weight"):
        packed().load_state_dict(state, strict=False)
    other = SplitAttention(packed(bias=True))
    other.k_proj = convert(other.k_proj, Factored(2)).module
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"k_proj.weight is a dense weight of shape \(12, 12\)"):
        other.load_state_dict(packed().state_dict())
    with pytest.raises(ValueError, match="a projection is in low-rank form"):
        other.joined()


def test_the_packed_weight_can_be_read_in_every_form_and_not_written_to():
    split = SplitAttention(packed())
    split.q_proj = convert(split.q_proj, Factored(3)).module
    W = split.in_proj_weight
    assert (W.shape, W.dtype, split.in_proj_bias.shape) == ((3 * E, E), torch.double, (3 * E,))
    parts = [split.q_proj.U @ split.q_proj.V, split.k_proj.weight, split.v_proj.weight]
    assert torch.equal(W + 0, torch.cat(parts))
    (W * torch.arange(3 * E)[:, None]).sum().backward()
    assert torch.equal(split.v_proj.weight.grad, torch.arange(2 * E, 3 * E)[:, None].double().expand(E, E))
    expected = torch.arange(E)[:, None].double().expand(E, E)
    torch.testing.assert_close(split.q_proj.U.grad, expected @ split.q_proj.V.detach().T)
    with pytest.raises(RuntimeError, match="would write to the weight"):
        nn.init.zeros_(split.in_proj_weight)
    assert SplitAttention(packed(kdim=7)).in_proj_weight is None
    assert SplitAttention(packed(kdim=7)).k_proj_weight.shape == (E, 7)


def test_a_copy_and_a_pickle_compute_the_same_and_share_nothing():
    split = SplitAttention(packed())
    given = inputs(split)
    for copied in (copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        assert torch.equal(copied(*given)[0], split(*given)[0])
        assert copied.q_proj.weight is not split.q_proj.weight


def test_new_random_weights_are_those_of_torch():
    split, attention = SplitAttention(packed()), packed()
    for module in (split, attention):
        torch.manual_seed(5)
        module._reset_parameters()
    assert all(torch.equal(v, attention.state_dict()[name]) for name, v in split.state_dict().items())


def test_a_projection_of_packed_attention_has_the_name_that_its_layer_will_have():
    model = nn.ModuleDict({"attn": packed()})
    layer = layer_of(model, "attn.k_proj")
    assert torch.equal(layer.weight, model["attn"].in_proj_weight[E : 2 * E])
    assert form_of(layer) == Dense()
    assert is_projection(layer)
    assert dense_key(model, "attn.k_proj") == "attn.k_proj.weight"


def test_sequences_of_different_lengths_are_attended_to_as_padded_ones():
    attention = packed(batch_first=True).float().eval()
    rows = [torch.randn(3, E), torch.randn(5, E)]
    nested = torch.nested.nested_tensor(rows)
    with torch.no_grad():
        found, _ = SplitAttention(attention)(nested, nested, nested, need_weights=False)
        for row, y in zip(rows, found.unbind(), strict=True):
            torch.testing.assert_close(y, attention(row, row, row)[0])
        with pytest.raises(ValueError, match="nested tensors are attended to by themselves alone"):
            SplitAttention(attention)(nested, nested, nested)
