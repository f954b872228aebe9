"""Second moments of fused experts' inputs and of the loss's gradients, against hooks and autograd by hand."""

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as T

from hf_drt import Adapter, Factored, convert, find_targets
from hf_drt.covariance import covariances_of, sensitivity_of
from hf_drt.forms import layer_of
from hf_drt.targets.surgery import Swap, replace

EXPERTS = "model.layers.0.mlp.experts"


def loss_of(model, batch):
    return model(**batch).loss


def routed(model, batch):
    """Hidden states and the experts that each token is routed to, by a hook."""
    seen = []
    owner = model.get_submodule(EXPERTS)
    handle = owner.register_forward_pre_hook(lambda m, args: seen.append([a.detach() for a in args]))
    model.eval()(**batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("form", [None, Factored(8), Adapter(4)], ids=str)
@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
def test_each_expert_has_the_inputs_that_are_routed_to_it(kernel, form):
    model, batch = tiny.mixtral(experts_implementation=kernel), tiny.batch(rows=8)
    names = [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"]
    hidden, index, _ = routed(model, batch)
    gate_up = model.get_submodule(EXPERTS).gate_up_proj.detach().clone()
    if form is not None:
        layer = layer_of(model, names[1])
        replace(model, [Swap(names[1], layer, convert(layer, form).module)])
    found = covariances_of(model, {name: layer_of(model, name) for name in names}, [batch])
    for expert in range(4):
        x = hidden.reshape(-1, 32)[(index == expert).any(-1).flatten()]
        torch.testing.assert_close(found[names[0]][expert], x.T @ x / hidden[..., 0].numel(), rtol=1e-4, atol=1e-6)
        gate, up = (x @ gate_up[expert].T).chunk(2, -1)
        y = F.silu(gate) * up
        torch.testing.assert_close(found[names[1]][expert], y.T @ y / hidden[..., 0].numel(), rtol=1e-4, atol=1e-7)
    assert model.config._experts_implementation == kernel
    assert "down_proj" not in vars(model.get_submodule(EXPERTS))


@pytest.mark.parametrize("cls", [T.GptOssForCausalLM, T.Llama4ForCausalLM])
def test_weights_that_are_stored_transposed_and_experts_that_see_all_tokens(cls):
    torch.manual_seed(0)
    size = {
        "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if cls is T.Llama4ForCausalLM:
        size |= {"intermediate_size_mlp": 48, "moe_layers": [0]}
        model = cls(T.Llama4TextConfig(**size))
    else:
        model = cls(T.GptOssConfig(**size))
    names = [name for name in find_targets(model).targets if "experts" in name]
    assert len(names) == 2
    layers = {name: layer_of(model, name) for name in names}
    C, G = covariances_of(model, layers, [tiny.batch()]), sensitivity_of(model, layers, [tiny.batch()], loss_of).G
    for name in names:
        assert C[name].shape == (4, layers[name].in_features, layers[name].in_features)
        assert G[name].shape == (4, layers[name].out_features, layers[name].out_features)
        assert (C[name].diagonal(dim1=1, dim2=2).sum(1) > 0).sum() >= 2


def gradients_by_hand(model, names, batch):
    """Of one output at a time, by autograd, in a forward pass of the test's own."""
    outputs = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: outputs.__setitem__(n, y)) for n in names
    ]
    loss = model.eval()(**batch).loss
    for handle in handles:
        handle.remove()
    return dict(zip(names, torch.autograd.grad(loss, [outputs[n] for n in names]), strict=True))


def test_gradients_at_the_outputs_are_those_of_autograd_and_parameters_get_none():
    model, batches = tiny.llama().train(), [tiny.batch(rows=4), tiny.batch(rows=8)]
    targets = find_targets(model).targets
    model.model.norm.weight.requires_grad_(False)
    found = sensitivity_of(model, targets, batches, loss_of).G
    asking = [p.requires_grad for p in model.parameters()]
    assert asking.count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    expected = dict.fromkeys(targets, 0)
    for batch in batches:
        for name, g in gradients_by_hand(model, list(targets), batch).items():
            rows = g.flatten(0, -2)
            expected[name] = expected[name] + len(rows) * rows.T @ rows / len(batches)
    assert found.keys() == expected.keys()
    for name, G in found.items():
        torch.testing.assert_close(G, expected[name], rtol=1e-4, atol=1e-7)


def test_of_convolutions_positions_count_and_channels_are_the_outputs():
    model = tiny.resnet()
    targets = find_targets(model).targets
    generator = torch.Generator().manual_seed(0)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1])}
    found = sensitivity_of(model, targets, [batch], loss_of).G
    for name, g in gradients_by_hand(model, list(targets), batch).items():
        rows = g.movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(found[name], len(rows) * rows.T @ rows, rtol=1e-3, atol=1e-6)


def test_the_second_order_estimate_is_exact_for_one_linear_layer_and_squared_error():
    """Where the Fisher matrix is the Hessian: targets drawn with noise of variance one, the factors independent."""
    torch.manual_seed(0)
    x, noise = torch.randn(20000, 6), torch.randn(20000, 4)
    layer = torch.nn.Linear(6, 4, bias=False)
    model = torch.nn.Sequential(layer)
    y = model(x).detach() + noise
    found = sensitivity_of(model, {"0": layer}, [x], lambda m, b: 0.5 * (m(b) - y).square().sum(1).mean())
    C, G = found.C["0"], found.G["0"]
    D = 0.1 * torch.randn(4, 6)
    rise = 0.5 * (x @ D.T).square().sum(1).mean()
    assert (0.5 * torch.trace(D @ C @ D.T @ G)).item() == pytest.approx(rise.item(), rel=0.05)


def test_a_pass_ends_after_the_last_block_that_is_asked_for():
    model = tiny.llama()
    first, second = model.model.layers
    calls = []
    second.register_forward_hook(lambda *_: calls.append(1))
    layers = {name: m for name, m in find_targets(model).targets.items() if ".layers.0." in name}
    batches = [tiny.batch(rows=2), tiny.batch(rows=3), tiny.batch(rows=4)]
    whole = covariances_of(model, layers, batches)
    assert len(calls) == 3
    stopped = covariances_of(model, layers, batches, last=first)
    assert len(calls) == 4, "the first pass is whole, as it counts how often the block is called"
    assert all(torch.equal(whole[name], C) for name, C in stopped.items())
    assert len(first._forward_hooks) == 0


@pytest.mark.parametrize("make", [tiny.llama, tiny.mixtral], ids=["linear layers", "fused experts"])
def test_one_pass_gives_the_inputs_moments_and_the_losses_too(make):
    model = make().eval()
    layers = {name: layer_of(model, name) for name in find_targets(model).targets}
    batches = [tiny.batch(), tiny.batch(rows=3)]
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    found = sensitivity_of(model, layers, batches, loss_of)
    assert len(calls) == 2
    C = covariances_of(model, layers, batches)
    assert set(found.C) == set(C)
    for name in C:
        torch.testing.assert_close(found.C[name], C[name], rtol=1e-6, atol=1e-7)
    assert found.losses == pytest.approx([loss_of(model, batch).item() for batch in batches], rel=1e-6)
