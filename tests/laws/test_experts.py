"""Laws of the forms of fused experts, in models of transformers and in each of its implementations of experts."""

import copy

import pytest
import tiny
import torch
import transformers as T
from forms import FORMS, PAIRS, ids

from hf_drt import DRTConfig, DynamicRank
from hf_drt.checkpoint.declaration import declare
from hf_drt.export import dense_state_dict, save_peft_adapter
from hf_drt.forms import Adapter, Dense, Factored, dense_key, effective_weight, form_of, layer_of, prepare
from hf_drt.optim.moments import MomentKeys, project
from hf_drt.simulate import batch_spec, estimate_run
from hf_drt.targets.experts import copies
from hf_drt.targets.selection import find_targets
from hf_drt.targets.surgery import Swap, replace

SIZE = {
    "vocab_size": tiny.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
MAKERS = {
    "mixtral": (T.MixtralForCausalLM, T.MixtralConfig, {"num_local_experts": 4}),
    "gpt_oss": (T.GptOssForCausalLM, T.GptOssConfig, {"num_local_experts": 4, "head_dim": 16}),
    "qwen3_moe": (
        T.Qwen3MoeForCausalLM, T.Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 40, "head_dim": 16},
    ),
}  # fmt: skip
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
models = pytest.mark.parametrize("kind", MAKERS)
pairs = pytest.mark.parametrize(("before", "after"), PAIRS, ids=ids)


def model(kind, implementation="grouped_mm", **changes):
    cls, config, own = MAKERS[kind]
    torch.manual_seed(0)
    return cls(config(**SIZE, **own, experts_implementation=implementation, **changes))


def names(net):
    return [name for name in find_targets(net).targets if "experts" in name]


def put(net, form):
    for name in names(net):
        old = layer_of(net, name)
        conversion = prepare(old, form)
        replace(net, [Swap(name, old, conversion.module)])
        conversion.commit()
        if isinstance(form, Adapter):
            torch.nn.init.normal_(conversion.module.lora_B, std=0.1)
    return net


@models
@pairs
def test_each_expert_is_truncated_as_by_its_own_svd(kind, before, after):
    net = put(model(kind), before)
    for name in names(net):
        layer = layer_of(net, name)
        W = effective_weight(layer).double()
        conversion = prepare(layer, after)
        new = effective_weight(conversion.commit()).double()
        tails = torch.linalg.svdvals(W)[:, after.rank :] if isinstance(after, Factored) else torch.zeros(1)
        expected = (tails.square().sum() / W.square().sum()).sqrt().item()
        assert conversion.error == pytest.approx(expected, abs=1e-5)
        assert ((new - W).norm() / W.norm()).item() == pytest.approx(expected, abs=1e-5)
        assert all(p.is_contiguous() for p in conversion.module.parameters())


@models
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", [Factored(8), Factored(3), Adapter(4, 8.0, "principal")], ids=ids)
def test_output_and_gradients_are_those_of_the_formed_weights(kind, implementation, form, monkeypatch):
    """Against the dense model with W formed, and by the chain rule: dL/dL = s G R^T, dL/dR = s L^T G."""
    net, reference = put(model(kind, implementation), form), model(kind, implementation)
    reference.load_state_dict(dense_state_dict(net))
    assert net.config._experts_implementation == implementation
    layers = {name: layer_of(net, name) for name in names(net)}
    for layer in layers.values():
        monkeypatch.setattr(type(layer), "matrix", lambda self: pytest.fail("W was formed"))
    batch = tiny.batch()
    got, expected = net(**batch), reference(**batch)
    got.loss.backward()
    expected.loss.backward()
    assert torch.allclose(got.logits, expected.logits, atol=1e-5)
    for name, layer in layers.items():
        G = reference.get_parameter(name).grad
        G = layer.layout.matrix(G)
        L, R, s = layer.pair()
        assert torch.allclose(L.grad, s * G @ R.mT, atol=1e-6)
        assert torch.allclose(R.grad, s * L.mT @ G, atol=1e-6)


@models
@pairs
def test_a_round_trip_to_dense_keeps_the_function_and_the_order_of_parameters(kind, before, after):
    net = model(kind)
    order = [name for name, _ in net.named_parameters()]
    put(put(net, before), after)
    y = tiny.logits(net, tiny.batch())
    put(net, Dense())
    assert (tiny.logits(net, tiny.batch()) - y).abs().max() <= 1e-5
    assert [name for name, _ in net.named_parameters()] == order
    assert all(p.requires_grad for p in net.parameters())


@models
@pytest.mark.parametrize("init", ["zero", "principal"])
def test_w_keeps_its_object_from_dense_to_adapter_and_back(kind, init):
    net = model(kind)
    kept = {name: net.get_parameter(name) for name in names(net)}
    put(net, Adapter(4, 8.0, init))
    assert all(net.get_submodule(name).base is W and not W.requires_grad for name, W in kept.items())
    put(net, Dense())
    assert all(net.get_parameter(name) is W for name, W in kept.items())


@pairs
def test_weights_of_one_form_never_load_into_another_in_silence(before, after):
    """Also with strict=False, as the Trainer loads; of the same form they load strictly."""
    one, other = put(model("mixtral"), before), put(model("mixtral"), after)
    state = one.state_dict()
    if type(before) is type(after) and getattr(before, "rank", 0) == getattr(after, "rank", 0):
        other.load_state_dict(state)
        assert torch.equal(tiny.logits(one, tiny.batch()), tiny.logits(other, tiny.batch()))
        return
    with pytest.raises(RuntimeError, match=r"size mismatch|is a dense weight of shape|in another in the checkpoint"):
        other.load_state_dict(state, strict=False)


@models
@pytest.mark.parametrize("after", ["dense", "adapter"])
def test_the_optimizers_order_is_that_of_a_fresh_one(kind, after):
    net = model(kind)
    drt = DynamicRank(net, DRTConfig(schedule=f"factored@0 {after}@1", rank_multiple=4), max_steps=2)
    drt.apply(0)
    optimizer = torch.optim.AdamW(p for p in net.parameters() if p.requires_grad)
    net(**tiny.batch()).loss.backward()
    optimizer.step()
    drt.begin_step(1, optimizer)
    fresh = [id(p) for p in net.parameters() if p.requires_grad]
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == fresh


@pytest.mark.parametrize("form", [Factored(6), Adapter(6, 9.0, "principal")], ids=ids)
def test_moments_project_as_those_of_each_expert(form):
    """Each expert as a linear layer of its own, to low rank and back."""
    keys = MomentKeys(("exp_avg",), ("exp_avg_sq",))
    net = model("mixtral")
    name = names(net)[0]
    old = copy.deepcopy(layer_of(net, name))
    new = prepare(copy.deepcopy(old), form).commit()
    G = torch.randn(old.weight.shape, generator=torch.Generator().manual_seed(0))
    images = project(old, new, [{"exp_avg": G, "exp_avg_sq": G.square()}], keys)
    back = project(new, old, images, keys)[0]
    for e in range(old.layout.count):
        linear = torch.nn.Linear(old.in_features, old.out_features, bias=False)
        linear.weight.data = old.weight[e].detach().clone()
        single = prepare(copy.deepcopy(linear), form).commit()
        for own, stacked in zip(single.parameters(), new.parameters(), strict=True):
            own.data = stacked[e].detach().clone()
        expected = project(linear, single, [{"exp_avg": G[e], "exp_avg_sq": G[e].square()}], keys)
        for image, other in zip(images, expected, strict=True):
            assert all(torch.allclose(image[key][e], other[key], atol=1e-5) for key in other)
        returned = project(single, linear, expected, keys)[0]
        assert all(torch.allclose(back[key][e], returned[key], rtol=1e-3, atol=1e-4) for key in returned)


@models
@pytest.mark.parametrize("form", FORMS, ids=ids)
def test_native_and_dense_saving(kind, form, tmp_path):
    net = model(kind)
    drt = DynamicRank(net, DRTConfig(schedule="factored@0", rank_multiple=4), max_steps=1)
    put(net, form)
    declare(net)
    y = tiny.logits(net, tiny.batch())
    net.save_pretrained(tmp_path)
    loaded = type(net).from_pretrained(tmp_path)
    expected = Dense() if form == Dense(frozen=True) else form  # a model that is saved is frozen no more
    assert all(form_of(layer_of(loaded, name)) == expected for name in names(net))
    assert torch.equal(tiny.logits(loaded, tiny.batch()), y)
    plain = model(kind)
    plain.load_state_dict(dense_state_dict(net))
    assert torch.allclose(tiny.logits(plain, tiny.batch()), y, atol=1e-5)
    assert set(drt.targets) >= set(names(net))
    assert dense_key(net, names(net)[0]) == names(net)[0]


def test_costs_count_the_experts_that_a_token_meets():
    drt = DynamicRank(model("mixtral"), DRTConfig(schedule="factored@0", rank=4, include=["experts"]), max_steps=1)
    shapes = list(drt.targets.values())
    assert set(drt.copies.values()) == {(4, 2)}
    low, full = sum(4 * (m + n) for m, n in shapes), sum(m * n for m, n in shapes)
    assert drt.cost().flops == pytest.approx(low / full)
    mixed = DynamicRank(model("mixtral"), DRTConfig(schedule="factored@0", rank=4), max_steps=1)
    attention = [shape for name, shape in mixed.targets.items() if "experts" not in name]
    low, full = 2 * low + sum(4 * (m + n) for m, n in attention), 2 * full + sum(m * n for m, n in attention)
    assert mixed.cost().flops == pytest.approx(low / full)


@models
def test_a_plan_in_float32_counts_what_the_experts_do(kind):
    """The saving of an update step is that of the layers, each with the vectors that it multiplies."""
    with torch.device("meta"):
        net = model(kind)
    drt = DynamicRank(net, DRTConfig(schedule="factored@0", rank=4), max_steps=1)
    run = estimate_run(drt, batch_spec(net, 2, 16))
    saved = sum(
        2 * layer.rows * (Dense().flops(*layer.shape) - layer.forms[0].flops(*layer.shape)) for layer in run.layers
    )
    assert {layer.rows for layer in run.layers if "experts" in layer.name} == {2 * 16 * 2}
    assert run.dense.flops - run.phases[0].step.flops == saved


def test_what_stays_dense_is_said_with_its_share(caplog):
    config = T.MixtralConfig(**SIZE, num_local_experts=4)
    torch.manual_seed(0)
    net = T.MixtralForCausalLM(config)
    net.config._experts_implementation_internal = "sonicmoe"
    drt = DynamicRank(net, DRTConfig(schedule="factored@0", rank=4), max_steps=1)
    experts = sum(p.numel() for name, p in net.named_parameters() if ".experts." in name)
    share = experts / sum(p.numel() for p in net.parameters())
    assert f"{share:.1%} of the model's parameters stay dense" in caplog.text
    assert {drt.skipped[name] for name in drt.skipped if "experts" in name} == {"fused experts of the kernel sonicmoe"}


def unknown(experts):
    weight = experts.down_proj
    del experts.down_proj
    experts.other_proj = weight


def quantized(experts, dtype):
    experts.down_proj = torch.nn.Parameter(experts.down_proj.detach().to(dtype), requires_grad=False)


REASONS = {
    "fused experts of an unknown layout": unknown,
    "fused experts, quantized": lambda experts: quantized(experts, torch.int8),
    "fused experts, quantized, to floats": lambda experts: quantized(experts, torch.float8_e4m3fn),
    "fused experts, frozen": lambda experts: experts.down_proj.requires_grad_(False),
    "fused experts, spread over processes": lambda experts: setattr(experts, "_is_expert_parallel", True),
    "tied or shared weight": lambda experts: experts.register_module("twin", Twin(experts.down_proj)),
}


class Twin(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight


@pytest.mark.parametrize("case", REASONS)
def test_reasons_to_stay_dense(case):
    net = model("mixtral")
    assert "model.layers.0.mlp.experts.down_proj" in find_targets(net).targets
    REASONS[case](net.model.layers[0].mlp.experts)
    found = find_targets(net)
    name = next(name for name in found.skipped if name.endswith(("down_proj", "other_proj")))
    assert found.skipped[name] == case.removesuffix(", to floats")
    assert (found.fused_share > 0) == case.startswith("fused")


def test_the_user_may_leave_experts_out():
    selection = find_targets(model("mixtral"), exclude=["experts"])
    assert not any("experts" in name for name in selection.targets)
    assert selection.fused_note() is None


@pytest.mark.parametrize("form", [Adapter(4), Factored(4)], ids=ids)
def test_low_rank_experts_are_not_for_peft(form, tmp_path):
    net = put(model("mixtral"), form)
    q_proj = net.get_submodule("model.layers.0.self_attn.q_proj")
    replace(net, [Swap("q_proj", q_proj, prepare(q_proj, Adapter(4)).commit())])
    with pytest.raises(ValueError, match=r"_proj is of fused experts, whose adapters PEFT lays out in another way"):
        save_peft_adapter(net, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_rank_that_an_expert_does_not_have_is_refused():
    net = model("mixtral")
    with pytest.raises(ValueError, match=r"rank must lie in 1\.\.32 for a layer of shape \(out, in\) = \(96, 32\)"):
        prepare(layer_of(net, names(net)[0]), Factored(40))


def test_writing_to_the_weight_of_an_expert_is_refused():
    net = put(model("mixtral"), Factored(4))
    with pytest.raises(RuntimeError, match="would write to the weight of a low-rank layer"):
        layer_of(net, names(net)[0]).weight.zero_()


def test_all_experts_count_where_the_configuration_does_not_tell():
    net = model("mixtral")
    net.config.__dict__["num_experts_per_tok"] = None
    name = names(net)[0]
    assert copies(net, name, layer_of(net, name)) == (4, 4)
