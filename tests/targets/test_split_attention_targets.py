"""Packed attention in a model: selected as layers, split for good by whoever changes it, and joined again."""

import copy

import pytest
import torch
from torch import nn

from hf_drt import DRTConfig, DynamicRank, dense_state_dict, find_targets, join_attention, split_attention
from hf_drt.compress import compress
from hf_drt.forms import LowRankLinear, SplitAttention

D = 16
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")


def encoder(depth: int = 2, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    settings = {"dropout": 0.0, "batch_first": True, **options}
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(D, 2, 2 * D, **settings), depth)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)
    return model


def config(**changes) -> DRTConfig:
    rank = {} if "rank" in changes else {"rank_multiple": 1}
    return DRTConfig(**{"schedule": "factored@0 dense@1 adapter@2 factored@3", **rank, **changes})


def names(layer: int = 0) -> list[str]:
    return [f"layers.{layer}.self_attn.{part}" for part in PARTS]


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = True
    torch.manual_seed(1)
    return torch.randn(3, 5, D), mask


def test_looking_for_targets_changes_nothing():
    model = encoder()
    parameters, modules = list(model.parameters()), list(model.modules())
    assert set(names()) < set(find_targets(model).targets)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_a_refused_configuration_leaves_attention_packed():
    model = encoder()
    with pytest.raises(ValueError, match="no layer to train"):
        DynamicRank(model, config(exclude=["."]), 4)
    with pytest.raises(ValueError, match="blocks"):
        DynamicRank(model, config(blocks=["Nothing"]), 4)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_only_attention_with_a_target_is_split():
    model = encoder()
    drt = DynamicRank(model, config(include=[r"layers\.1\.", "linear"]), 4)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert isinstance(model.layers[1].self_attn, SplitAttention)
    assert set(names(1)) < drt.targets.keys()
    assert set(names(0)) & drt.targets.keys() == set()


def test_every_form_computes_what_torchs_model_with_its_weights_computes():
    model, twin = encoder().eval(), encoder().eval()
    x, mask = padded()
    drt = DynamicRank(model, config(), 4)
    for step in range(4):
        drt.apply(step)
        twin.load_state_dict(dense_state_dict(model))
        for given in ({}, {"src_key_padding_mask": mask}):
            y, expected = model(x, **given)[~mask], twin(x, **given)[~mask]
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        twin.zero_grad()
        model.zero_grad()
        y.square().sum().backward()
        expected.square().sum().backward()
        for part, G in zip(PARTS, twin.layers[0].self_attn.in_proj_weight.grad.chunk(3), strict=False):
            layer = model.layers[0].self_attn.get_submodule(part)
            if step in (0, 3):
                torch.testing.assert_close(layer.U.grad, G @ layer.V.detach().T, rtol=1e-4, atol=1e-5)
            elif step == 1:
                torch.testing.assert_close(layer.weight.grad, G, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("split", [None, names(1)])
def test_the_fused_kernel_for_inference_neither_bypasses_factors_nor_fails(split):
    model, twin = encoder().eval(), encoder().eval()
    x, mask = padded()
    split_attention(model, split)
    with torch.no_grad():  # torch makes a nested tensor of a padded batch if the first layer allows it
        found, expected = model(x, src_key_padding_mask=mask), twin(x, src_key_padding_mask=mask)
        torch.testing.assert_close(found[~mask], expected[~mask])
        torch.testing.assert_close(model(x), twin(x))
        DynamicRank(model, config(rank=1), 4).apply(0)
        twin.load_state_dict(dense_state_dict(model))
        torch.testing.assert_close(model(x), twin(x))
        assert (model(x) - expected).abs().max() > 0.1


def test_to_dense_gives_back_torchs_own_modules_and_the_controller_goes_on_from_there():
    model = encoder()
    keys = list(model.state_dict())
    drt = DynamicRank(model, config(), 4)
    drt.apply(0)
    assert isinstance(model.layers[0].self_attn.q_proj, LowRankLinear)
    drt.to_dense()
    assert drt.is_dense
    assert not any(isinstance(m, SplitAttention) for m in model.modules())
    assert list(model.state_dict()) == keys
    drt.apply(0)
    assert isinstance(model.layers[0].self_attn.q_proj, LowRankLinear)
    drt.apply(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    drt.to_dense(optimizer)
    assert isinstance(model.layers[0].self_attn, SplitAttention)  # whose weights the optimizer holds
    assert join_attention(model) == ["layers.0.self_attn", "layers.1.self_attn"]


def test_frozen_attention_stays_as_it_is():
    model = encoder()
    model.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    found = find_targets(model)
    assert [found.skipped[name] for name in names()[:3]] == ["frozen"] * 3
    assert names()[3] in found.targets


def held(model):
    model.kept = [model.layers[0].self_attn]


def tied(model):
    model.layers[0].self_attn.in_proj_weight = model.layers[1].self_attn.in_proj_weight


def hooked(model):
    model.layers[0].self_attn.register_forward_hook(lambda *args: None)


def of_a_subclass(model):
    model.layers[0].self_attn.__class__ = type("Own", (nn.MultiheadAttention,), {})


def with_a_forward_of_its_own(model):
    model.layers[0].self_attn.forward = lambda *args, **kwargs: (args[0], None)


def quantized(model):
    model.layers[0].self_attn.in_proj_weight = nn.Parameter(torch.zeros(3 * D, D, dtype=torch.int8), False)


@pytest.mark.parametrize("change", [held, tied, hooked, of_a_subclass, with_a_forward_of_its_own, quantized])
def test_attention_that_does_more_stays_packed_and_so_does_its_output_projection(change):
    model = encoder()
    change(model)
    found = find_targets(model)
    assert not set(names()) & found.targets.keys()
    assert found.skipped["layers.0.self_attn.out_proj"] in (
        "weight read by its owner",
        "owned by a torch.nn module",
        "held outside of the module tree",
    )
    assert "layers.0.self_attn" not in split_attention(model)


def test_attention_shared_by_two_blocks_is_split_once():
    model = encoder()
    model.layers[1].self_attn = model.layers[0].self_attn
    x, _ = padded()
    expected = model(x)
    assert split_attention(model) == ["layers.0.self_attn"]
    assert model.layers[1].self_attn is model.layers[0].self_attn
    torch.testing.assert_close(model(x), expected)
    join_attention(model)
    assert model.layers[1].self_attn is model.layers[0].self_attn
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_a_copy_before_the_run_trains_as_a_decoder_with_two_attentions_in_each_layer():
    torch.manual_seed(0)
    model = nn.Transformer(D, 2, 1, 1, 2 * D, dropout=0.0, batch_first=True)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 5, D)
    drt = DynamicRank(model, config(), 4)
    assert {name for name in drt.targets if name.startswith("decoder")} == {
        *(f"decoder.layers.0.{kind}.{part}" for kind in ("self_attn", "multihead_attn") for part in PARTS),
        "decoder.layers.0.linear1", "decoder.layers.0.linear2",
    }  # fmt: skip
    torch.testing.assert_close(model(x, x), twin(x, x))


def test_compress_reaches_it():
    model, x = encoder().eval(), padded()[0]
    expected = model(x)
    result = compress(model, rank=4, rank_multiple=1)
    assert {layer.name for layer in result.layers} >= set(names())
    assert isinstance(model.layers[0].self_attn.v_proj, LowRankLinear)
    twin = encoder().eval()
    twin.load_state_dict(dense_state_dict(model))
    torch.testing.assert_close(model(x), twin(x), rtol=1e-5, atol=1e-5)
    assert (model(x) - expected).abs().max() > 0.05
