"""Which layers are trained in changing rank, in real architectures and in modules built for one question each."""

import inspect
import re

import pytest
import tiny
import torch
import torch.nn.functional as F
import transformers as T
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_drt import Adapter, DRTConfig, DynamicRank, Factored, Selection, convert, find_targets, form_of
from hf_drt.forms import plain
from hf_drt.targets import selection
from hf_drt.targets.blocks import block_roots
from hf_drt.targets.surgery import Swap, replace

# ---- architectures


def falcon() -> nn.Module:
    return T.FalconForCausalLM(
        T.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, bos_token_id=0,
                       eos_token_id=0)
    )  # fmt: skip


def mixtral(**changes) -> nn.Module:
    config = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_local_experts": 4, **changes,
    }  # fmt: skip
    return T.MixtralForCausalLM(T.MixtralConfig(**config))


def qwen_moe() -> nn.Module:
    return T.Qwen2MoeForCausalLM(
        T.Qwen2MoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=24, num_hidden_layers=1,
            shared_expert_intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
        )
    )  # fmt: skip


def switch() -> nn.Module:
    return T.SwitchTransformersForConditionalGeneration(
        T.SwitchTransformersConfig(
            vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=2, num_experts=2,
            num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
        )
    )  # fmt: skip


def albert() -> nn.Module:
    return T.AlbertForMaskedLM(
        T.AlbertConfig(vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                       num_attention_heads=2)
    )  # fmt: skip


def mamba() -> nn.Module:
    return T.MambaForCausalLM(T.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1))


def in_blocks(blocks: list[str], leaves: str) -> list[str]:
    return [f"{block}.{leaf}" for block in blocks for leaf in leaves.split()]


ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
FUSED = "mlp.experts.gate_up_proj mlp.experts.down_proj"
ENCODER = " ".join(f"layer.0.SelfAttention.{leaf}" for leaf in "qkvo")
DECODER = f"{ENCODER} " + " ".join(f"layer.1.EncDecAttention.{leaf}" for leaf in "qkvo")
EXPERTS = " ".join(f"layer.{{layer}}.mlp.experts.expert_{i}.{leaf}" for i in range(2) for leaf in ("wi", "wo"))

# Model, its blocks, its targets, and the layers that stay dense.
ARCHITECTURES = {
    "llama": (
        tiny.llama,
        blocks := ["model.layers.0", "model.layers.1"],
        in_blocks(blocks, f"{ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj"),
        {"lm_head": "outside of the blocks"},
    ),
    "gpt2": (
        tiny.gpt2,
        blocks := ["transformer.h.0", "transformer.h.1"],
        in_blocks(blocks, "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
        {"lm_head": "outside of the blocks"},
    ),
    "bert": (
        tiny.bert,
        blocks := ["bert.encoder.layer.0", "bert.encoder.layer.1"],
        in_blocks(
            blocks,
            "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
            "output.dense",
        ),
        {
            "cls.predictions.transform.dense": "outside of the blocks",
            "cls.predictions.decoder": "outside of the blocks",
        },
    ),
    "t5": (
        tiny.t5,
        [f"{stack}.block.{i}" for stack in ("encoder", "decoder") for i in range(2)],
        in_blocks(
            ["encoder.block.0", "encoder.block.1"], f"{ENCODER} layer.1.DenseReluDense.wi layer.1.DenseReluDense.wo"
        )
        + in_blocks(
            ["decoder.block.0", "decoder.block.1"], f"{DECODER} layer.2.DenseReluDense.wi layer.2.DenseReluDense.wo"
        ),
        {"lm_head": "outside of the blocks"},
    ),
    "vit": (
        tiny.vit,
        blocks := ["vit.layers.0", "vit.layers.1"],
        in_blocks(blocks, "attention.q_proj attention.k_proj attention.v_proj attention.o_proj mlp.fc1 mlp.fc2"),
        {
            "vit.embeddings.patch_embeddings.projection": "outside of the blocks",
            "classifier": "outside of the blocks",
        },
    ),
    "falcon, whose linear layer is a subclass": (
        falcon,
        blocks := ["transformer.h.0", "transformer.h.1"],
        in_blocks(blocks, "self_attention.query_key_value self_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h"),
        {"lm_head": "outside of the blocks"},
    ),
    "mixtral, whose experts are one tensor": (
        mixtral,
        blocks := ["model.layers.0", "model.layers.1"],
        in_blocks(blocks, f"{ATTENTION} {FUSED}"),
        {"lm_head": "outside of the blocks"},
    ),
    "switch transformers, whose experts are layers": (
        switch,
        ["encoder.block.0", "decoder.block.0"],
        in_blocks(["encoder.block.0"], f"{ENCODER} {EXPERTS.format(layer=1)}")
        + in_blocks(["decoder.block.0"], f"{DECODER} {EXPERTS.format(layer=2)}"),
        {
            "encoder.block.0.layer.1.mlp.router.classifier": "router of a mixture of experts",
            "decoder.block.0.layer.2.mlp.router.classifier": "router of a mixture of experts",
            "lm_head": "outside of the blocks",
        },
    ),
    "qwen moe, whose shared expert has a gate": (
        qwen_moe,
        ["model.layers.0"],
        in_blocks(
            ["model.layers.0"],
            f"{ATTENTION} {FUSED} mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj",
        ),
        {
            "model.layers.0.mlp.shared_expert_gate": "router of a mixture of experts",
            "lm_head": "outside of the blocks",
        },
    ),
    "albert, whose layers are one": (
        albert,
        ["albert.encoder.albert_layer_groups.0"],
        in_blocks(
            ["albert.encoder.albert_layer_groups.0.albert_layers.0"],
            "attention.query attention.key attention.value attention.dense ffn ffn_output",
        ),
        {
            "albert.encoder.embedding_hidden_mapping_in": "outside of the blocks",
            "predictions.dense": "outside of the blocks",
            "predictions.decoder": "outside of the blocks",
        },
    ),
    "mamba, whose kernels read weights": (
        mamba,
        ["backbone.layers.0"],
        ["backbone.layers.0.mixer.in_proj"],
        {
            **dict.fromkeys(
                in_blocks(["backbone.layers.0.mixer"], "x_proj dt_proj out_proj"), "weight read by its owner"
            ),
            "backbone.layers.0.mixer.conv1d": "depthwise convolution",
            "lm_head": "outside of the blocks",
        },
    ),
}
architectures = pytest.mark.parametrize(
    ("make", "blocks", "targets", "skipped"), ARCHITECTURES.values(), ids=ARCHITECTURES.keys()
)


@architectures
def test_an_architectures_blocks_and_targets(make, blocks, targets, skipped):
    model = make()
    assert list(block_roots(model)) == blocks
    found = find_targets(model)
    assert sorted(found.targets) == sorted(targets)
    assert found.skipped == skipped


@architectures
def test_targets_come_in_the_order_of_the_model(make, blocks, targets, skipped):
    model = make()
    modules = dict(model.named_modules())
    found = find_targets(model).targets
    own = {
        name: [f"{name}.{leaf}" for leaf, _ in module.named_parameters(recurse=False)]
        for name, module in modules.items()
    }
    assert list(found) == [place for name in modules for place in (name, *own[name]) if place in found]
    assert all(
        modules[name] is layer if name in modules else layer.weight is model.get_parameter(name)
        for name, layer in found.items()
    )


@pytest.mark.parametrize("make", tiny.MODELS.values(), ids=tiny.MODELS.keys())
@pytest.mark.parametrize("form", [Factored(4), Adapter(4)], ids=str)
def test_layers_in_another_form_are_still_targets(make, form):
    model = make()
    before = find_targets(model)
    replace(model, [Swap(name, m, convert(m, form).module) for name, m in before.targets.items()])
    after = find_targets(model)
    assert list(after.targets) == list(before.targets)
    assert after.skipped == before.skipped
    assert {form_of(module) for module in after.targets.values()} == {form}


def test_a_layer_as_wide_as_the_number_of_experts_is_no_router():
    # One key-value head of width 8 next to 8 experts.
    model = mixtral(num_local_experts=8, num_key_value_heads=1, num_attention_heads=4, head_dim=8)
    expected = in_blocks(["model.layers.0", "model.layers.1"], f"{ATTENTION} {FUSED}")
    assert sorted(find_targets(model).targets) == sorted(expected)


# ---- a small net, and one thing changed in it


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.blocks = nn.ModuleList(blocks or (Block(), Block()))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Checkpointed(GradientCheckpointingLayer, Block):
    pass


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Normed(nn.Linear):
    def forward(self, x):
        return super().forward(F.layer_norm(x, x.shape[-1:]))


class Failing(nn.Linear):
    def forward(self, x):
        raise RuntimeError("needs a second argument")


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Exact(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Renamed(nn.Linear):
    """A subclass that leaves forward alone."""


class ReadsWeight(Block):
    def forward(self, x):
        return self.b(F.linear(x, self.a.weight, self.a.bias))


class HeldTwice(Block):
    """As MaskFormer's pixel decoder does: the list would go on with a layer that was replaced."""

    def __init__(self):
        super().__init__()
        self.steps = [self.a, self.b]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class HeldByName(Block):
    def __init__(self):
        super().__init__()
        self.steps = {"first": self.a}


class ReadsBias(Block):
    def forward(self, x):
        return self.b(self.a(x) + self.a.bias)


class ReadsWeightOfAnother(Block):
    """Reads the weight of a layer of the same name, but not its own."""

    def forward(self, x, other=None):
        return self.b(self.a(x if other is None else F.linear(x, other.a.weight)))


class ReadsDtype(Block):
    """As T5 does."""

    def forward(self, x):
        if isinstance(self.a.weight, torch.Tensor) and self.a.weight.dtype != torch.int8:
            x = x.to(self.a.weight.dtype).to(self.a.weight.device)
        return self.b(self.a(x))


class WithAttention(Block):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)


class Experts(nn.Module):
    """A gate, two experts, and a gated layer in each."""

    def __init__(self, gate: str = "gate", experts: int = 2):
        super().__init__()
        setattr(self, gate, nn.Linear(4, experts))
        self.experts = nn.ModuleList(nn.ModuleDict({"gate_proj": nn.Linear(4, 6)}) for _ in range(2))


class MoE(Block):
    def __init__(self, *args):
        super().__init__()
        self.mlp = Experts(*args)


class Config:
    def __init__(self, **values):
        self.__dict__.update(values)


def net(block: nn.Module | None = None, change=None, **config) -> Net:
    """A net of two blocks; the first may be another one, or have something done to it."""
    made = Net(block or Block(), Block())
    if change is not None:
        change(made)
    if config:
        made.config = Config(**config)
    return made


def first(layer: nn.Module):
    """Put another layer in the place of ``blocks.0.a``."""
    return lambda n: setattr(n.blocks[0], "a", layer)


def with_extra_parameter(layer: nn.Linear) -> nn.Linear:
    layer.register_parameter("scale", nn.Parameter(torch.ones(4)))
    return layer


def with_weight(weight: torch.Tensor, trained: bool = True) -> nn.Linear:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(weight, requires_grad=trained)
    return layer


def tie(one: nn.Module, other: nn.Module) -> None:
    one.weight = other.weight


EVERYTHING = {"blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b", "head"}

OVERRIDES = "its class overrides forward"

# Net, the layers that stay dense beside the head, and why. More of what a layer may do of its own: test_plain.py.
SKIPPED = {
    "nothing": (net, "", ""),
    "output embeddings": (
        lambda: net(change=lambda n: setattr(n, "get_output_embeddings", lambda: n.blocks[0].a)),
        "blocks.0.a",
        "output embeddings",
    ),
    "parametrized": (
        lambda: net(change=lambda n: nn.utils.parametrizations.weight_norm(n.blocks[0].a)),
        "blocks.0.a",
        "parametrized",
    ),
    "weight norm by a hook": (
        lambda: net(change=lambda n: nn.utils.weight_norm(n.blocks[0].a)),
        "blocks.0.a",
        "parametrized",
    ),
    "parametrized bias": (
        lambda: net(
            change=lambda n: nn.utils.parametrize.register_parametrization(n.blocks[0].a, "bias", nn.Identity())
        ),
        "blocks.0.a",
        "parametrized",
    ),
    "integers": (
        lambda: net(change=first(with_weight(torch.zeros(4, 4, dtype=torch.int8), trained=False))),
        "blocks.0.a",
        "quantized or not a plain matrix",
    ),
    "a stack of matrices": (
        lambda: net(change=first(with_weight(torch.zeros(2, 4, 4)))),
        "blocks.0.a",
        "quantized or not a plain matrix",
    ),
    "a third parameter": (
        lambda: net(change=first(with_extra_parameter(nn.Linear(4, 4)))),
        "blocks.0.a",
        "holds more than weight and bias",
    ),
    "frozen": (lambda: net(change=lambda n: n.blocks[0].a.weight.requires_grad_(False)), "blocks.0.a", "frozen"),
    "tied to a layer": (
        lambda: net(change=lambda n: tie(n.blocks[0].a, n.blocks[1].b)),
        "blocks.0.a blocks.1.b",
        "tied or shared weight",
    ),
    "tied to the embedding": (
        lambda: net(change=lambda n: tie(n.blocks[0].a, n.embed)),
        "blocks.0.a",
        "tied or shared weight",
    ),
    "forward hook": (
        lambda: net(change=lambda n: n.blocks[0].a.register_forward_hook(lambda *args: None)),
        "blocks.0.a",
        "hooked (forward)",
    ),
    "forward pre-hook": (
        lambda: net(change=lambda n: n.blocks[0].a.register_forward_pre_hook(lambda *args: None)),
        "blocks.0.a",
        "hooked (forward pre)",
    ),
    "backward hook": (
        lambda: net(change=lambda n: n.blocks[0].a.register_full_backward_hook(lambda *args: None)),
        "blocks.0.a",
        "hooked (backward)",
    ),
    "backward pre-hook": (
        lambda: net(change=lambda n: n.blocks[0].a.register_full_backward_pre_hook(lambda *args: None)),
        "blocks.0.a",
        "hooked (backward pre)",
    ),
    "multi-head attention with a hook": (
        lambda: net(WithAttention(), lambda n: n.blocks[0].attention.register_forward_hook(print)),
        "blocks.0.attention.out_proj",
        "owned by a torch.nn module",
    ),
    "router called gate": (
        lambda: net(MoE("gate", 2), num_experts=2),
        "blocks.0.mlp.gate",
        "router of a mixture of experts",
    ),
    "router of another width": (
        lambda: net(MoE("router", 3), num_local_experts=2),
        "blocks.0.mlp.router",
        "router of a mixture of experts",
    ),
    "router of another name": (
        lambda: net(MoE("wg", 2), n_routed_experts=2),
        "blocks.0.mlp.wg",
        "router of a mixture of experts",
    ),
    "a layer that scales": (lambda: net(change=first(Scaled(4, 4))), "blocks.0.a", OVERRIDES),
    "a layer that normalises": (lambda: net(change=first(Normed(4, 4))), "blocks.0.a", OVERRIDES),
    "a layer that fails": (lambda: net(change=first(Failing(4, 4))), "blocks.0.a", OVERRIDES),
    "a layer that gives a pair": (lambda: net(change=first(Pair(4, 4))), "blocks.0.a", OVERRIDES),
    "a linear map written out by a class that is not known": (
        lambda: net(change=first(Exact(4, 4))),
        "blocks.0.a",
        OVERRIDES,
    ),
    "a forward set on the instance": (
        lambda: net(change=lambda n: setattr(n.blocks[0].a, "forward", nn.Linear(4, 4).forward)),
        "blocks.0.a",
        "own forward on the instance",
    ),
    "a hook on the weight": (
        lambda: net(change=lambda n: n.blocks[0].a.weight.register_hook(lambda g: g)),
        "blocks.0.a",
        "hooked weight",
    ),
    "an owner that reads the weight": (lambda: net(ReadsWeight()), "blocks.0.a", "weight read by its owner"),
    "an owner with a list of its layers": (
        lambda: net(HeldTwice()),
        "blocks.0.a blocks.0.b",
        "held outside of the module tree",
    ),
    "an owner with a dict of its layers": (lambda: net(HeldByName()), "blocks.0.a", "held outside of the module tree"),
    "an owner that reads the bias": (lambda: net(ReadsBias()), "blocks.0.a", "weight read by its owner"),
}


def linear_layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(("make", "layers", "reason"), SKIPPED.values(), ids=SKIPPED.keys())
def test_a_layer_that_cannot_be_replaced_stays_dense_and_says_why(make, layers, reason):
    model = make()
    found = find_targets(model)
    assert found.skipped == {**dict.fromkeys(layers.split(), reason), "head": "outside of the blocks"}
    assert set(found.targets) == linear_layers(model) - set(found.skipped)


def test_every_reason_is_reached():
    sources = map(inspect.getsource, (selection._reason, selection._unfit, selection._pattern_reason, plain))
    elsewhere = ("outside of the blocks", "weight written by the model", "neither a linear layer nor a convolution")
    starts = {*re.findall(r'return f?"([^"{]+)', "".join(sources)), selection._READ} - set(elsewhere)
    assert len(starts) >= 14
    by_pattern = {"not matched by include", "matched by exclude"}
    reached = {reason for _, _, reason in SKIPPED.values()} - {""} | by_pattern
    assert all(any(reason.startswith(start) for reason in reached) for start in starts)
    assert all(any(reason.startswith(start) for start in starts) for reason in reached)


TAKEN = {
    "a subclass that leaves forward alone": lambda: net(change=first(Renamed(4, 4))),
    "a layer without a bias": lambda: net(change=first(nn.Linear(4, 4, bias=False))),
    "a layer in half precision": lambda: net(change=first(nn.Linear(4, 4, dtype=torch.bfloat16))),
    "a layer whose bias is frozen": lambda: net(change=lambda n: n.blocks[0].a.bias.requires_grad_(False)),
    "an owner that reads the dtype": lambda: net(ReadsDtype()),
    "an owner that reads another's weight": lambda: net(ReadsWeightOfAnother()),
    "a gate without experts": lambda: net(MoE("gate", 2)),
    "a model with one expert": lambda: net(MoE("gate", 2), num_experts=1),
    "a sequence": lambda: net(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))),
    "a hook on the block": lambda: net(change=lambda n: n.blocks[0].register_forward_hook(lambda *args: None)),
}


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN.keys())
def test_a_layer_that_can_be_replaced_is_taken(make):
    model = make()
    assert set(find_targets(model).targets) == linear_layers(model) - {"head"}


# ---- patterns


@pytest.mark.parametrize(
    ("include", "exclude", "targets"),
    [
        (None, None, {"blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"}),
        (["a$"], None, {"blocks.0.a", "blocks.1.a"}),
        ([r"\.0\.", "b$"], None, {"blocks.0.a", "blocks.0.b", "blocks.1.b"}),
        (None, ["a$"], {"blocks.0.b", "blocks.1.b"}),
        (None, [r"\.0\.a", r"\.1\.b"], {"blocks.0.b", "blocks.1.a"}),
        (["a$"], [r"\.0\."], {"blocks.1.a"}),
        (None, [], {"blocks.0.a", "blocks.0.b", "blocks.1.a", "blocks.1.b"}),
    ],
)
def test_patterns_narrow_the_targets(include, exclude, targets):
    found = find_targets(Net(), include, exclude)
    assert set(found.targets) == targets
    assert set(found.targets) | set(found.skipped) == EVERYTHING
    reasons = {found.skipped[name] for name in EVERYTHING - targets - {"head"}}
    assert reasons <= {"not matched by include", "matched by exclude"}


def test_include_does_not_add_what_the_rule_leaves_out():
    found = find_targets(Net(), include=["head", "blocks.0.a"])
    assert list(found.targets) == ["blocks.0.a"]
    assert found.skipped["head"] == "outside of the blocks"


def test_an_empty_include_keeps_nothing():
    with pytest.raises(ValueError, match=r"4 not matched by include; 1 outside of the blocks\. include=\[\]"):
        find_targets(Net(), include=[])


def test_the_summary_counts_by_reason_the_most_frequent_first():
    skipped = {"a": "frozen", "b": "hooked", "c": "frozen"}
    assert Selection({}, skipped).summary() == "2 frozen; 1 hooked"
    assert Selection({}, {}).summary() == "no linear layer at all"


# ---- blocks


class Named(nn.Module):
    """A model that names the classes of its blocks, and holds them without a list."""

    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = Block(), Block(), nn.Linear(4, 4)


class Nested(Block):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([Block()])


@pytest.mark.parametrize(
    ("make", "blocks"),
    [
        (lambda: Net(Checkpointed(), Checkpointed()), ["blocks.0", "blocks.1"]),
        (Named, ["one", "two"]),
        (Net, ["blocks.0", "blocks.1"]),
        (lambda: Net(Nested(), Block()), ["blocks.0", "blocks.1"]),
        (lambda: Net(*(Block() for _ in range(11))), [f"blocks.{i}" for i in range(11)]),
        (lambda: Net(Block(), nn.Linear(4, 4), nn.ReLU()), ["blocks.0"]),
        (lambda: Net(Checkpointed(), Block()), ["blocks.0"]),
        (lambda: nn.ModuleList([Block()]), ["0"]),
        (lambda: nn.Sequential(Block(), Block()), ["0", "1"]),
        (lambda: nn.Sequential(Block(), nn.ReLU()), []),
        (lambda: nn.Linear(4, 4), []),
    ],
    ids=["checkpointing layers", "named classes", "list", "nested", "eleven", "one linear layer is no block",
         "checkpointing layers come first", "the model is the list", "sequence",
         "a sequence that repeats nothing", "no block"],
)  # fmt: skip
def test_the_outermost_blocks_are_found(make, blocks):
    assert list(block_roots(make())) == blocks


def test_named_classes_may_be_given_as_any_collection_or_not_at_all():
    model = Named()
    for given in ({"Block"}, ["Block"], ("Block", "Other")):
        model._no_split_modules = given
        assert list(block_roots(model)) == ["one", "two"]
    model._no_split_modules = None
    assert list(block_roots(model)) == []


def test_a_model_inside_a_wrapper_has_the_same_targets():
    wrapper = nn.Module()
    wrapper.module = tiny.llama()
    assert list(find_targets(wrapper).targets) == [f"module.{name}" for name in find_targets(wrapper.module).targets]


def test_selecting_changes_nothing():
    model = tiny.llama()
    rng = torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_targets(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- shared layers


def shared_layer() -> Net:
    """One layer under two parents and two names."""
    made = net()
    made.blocks[1].b = made.blocks[0].a
    return made


def shared_block() -> Net:
    block = Block()
    return Net(block, Block(), block)


SHARED = {
    "layer": (shared_layer, [("blocks.0.a", "blocks.1.b")]),
    "block": (shared_block, [("blocks.0.a", "blocks.2.a"), ("blocks.0.b", "blocks.2.b")]),
}


@pytest.mark.parametrize(("make", "pairs"), SHARED.values(), ids=SHARED.keys())
@pytest.mark.parametrize("schedule", ["factored:1@0 adapter:1@2 dense@4", "adapter:1@0 factored:1@2 dense@4"])
def test_a_layer_under_two_parents_is_replaced_under_both(make, pairs, schedule):
    model = make()
    controller = DynamicRank(model, DRTConfig(schedule=schedule), max_steps=6)
    assert set(controller.targets) >= {one for one, _ in pairs}
    assert not set(controller.targets) & {other for _, other in pairs}
    for step, kind in zip((0, 2, 4), schedule.split(), strict=True):
        before = {one: model.get_submodule(one) for one, _ in pairs}
        controller.apply(step)
        for one, other in pairs:
            assert model.get_submodule(one) is model.get_submodule(other)
            assert model.get_submodule(one) is not before[one]
            assert type(form_of(model.get_submodule(one))).__name__.lower() in kind


def test_a_shared_layer_has_one_set_of_weights_in_every_form():
    model = shared_layer()
    controller = DynamicRank(model, DRTConfig(schedule="factored:1@0 adapter:1@2 dense@4"), max_steps=6)
    for step, weights in ((0, 2), (2, 3), (4, 1)):
        controller.apply(step)
        layer = model.blocks[0].a
        own = [name for name, parameter in model.named_parameters() if any(parameter is p for p in layer.parameters())]
        assert len(own) == weights + 1  # and the bias
        model(torch.ones(1, 4)).sum().backward()
        assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)
