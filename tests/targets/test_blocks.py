"""What is a block in models that are none of transformers', and how a setting says it."""

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from hf_drt import DRTConfig, DynamicRank, Factored, convert, dense_state_dict, find_targets, split_attention
from hf_drt.compress import compress, plan_compression
from hf_drt.targets.blocks import block_roots
from hf_drt.targets.surgery import Swap, replace

D = 8


class Mlp(nn.Module):
    def __init__(self, width: int = D):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """As in timm's vision transformers."""

    def __init__(self, width: int = D):
        super().__init__()
        self.attn, self.mlp = nn.Linear(width, width), Mlp(width)

    def forward(self, x):
        return x + self.mlp(self.attn(x))


class ViT(nn.Module):
    """Blocks in a Sequential."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Linear(4, D)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(D, 3)

    def forward(self, x):
        return self.head(self.blocks(self.patches(x)))


class Stage(nn.Module):
    def __init__(self, width: int, depth: int):
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.downsample = nn.Linear(width, 2 * width)

    def forward(self, x):
        return self.downsample(self.blocks(x))


class Swin(nn.Module):
    """A Sequential of stages, each with a Sequential of blocks; one stage has a single block."""

    def __init__(self, first: int = 1):
        super().__init__()
        self.layers = nn.Sequential(Stage(D, first), Stage(2 * D, 2))
        self.head = nn.Linear(4 * D, 3)

    def forward(self, x):
        return self.head(self.layers(x))


class Sandwich(nn.Sequential):
    """Everything in one Sequential: what comes before and after the blocks does not repeat."""

    def __init__(self):
        super().__init__(nn.Sequential(nn.Linear(4, D), nn.Linear(D, D)), Block(), Block(), Mlp())


class Unit(nn.Module):
    def __init__(self, width: int = D):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.b(self.a(x)).relu()


class Wide(nn.Module):
    """A block with a Sequential of repeated units inside of it, which are not all that it holds."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.mlp = nn.Sequential(Unit(), Unit())

    def forward(self, x):
        return self.mlp(self.o(self.q(x) + self.k(x) + self.v(x)))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(D, D)
        self.experts = nn.ModuleList(Mlp() for _ in range(3))

    def forward(self, x):
        return sum(expert(self.attn(x)) for expert in self.experts)


class Res(nn.Module):
    """One linear layer beside two convolutions, as in a U-Net."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(D, D, 3, padding=1), nn.Conv1d(D, D, 3, padding=1)
        self.time = nn.Linear(4, D)

    def forward(self, x, t):
        return x + self.conv2(F.silu(self.conv1(x) + self.time(t)[:, :, None]))


class Level(nn.Module):
    def __init__(self, depth: int):
        super().__init__()
        self.resnets = nn.ModuleList(Res() for _ in range(depth))

    def forward(self, x, t):
        for resnet in self.resnets:
            x = resnet(x, t)
        return x


class Down(Level):
    """A level's class of its own for each way."""


class Middle(Level):
    pass


class UNet(nn.Module):
    """Levels of one ResNet on the way down, of two on the way up, and a middle that is in no list."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 4)
        self.down = nn.ModuleList([Down(1), Down(1)])
        self.mid = Middle(1)
        self.up = nn.ModuleList([Level(2), Level(2)])

    def forward(self, x, t):
        t = self.embed(t)
        for level in (*self.down, self.mid, *self.up):
            x = level(x, t)
        return x


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.blocks = nn.Linear(D, D), nn.ModuleList([Block()])

    def forward(self, x):
        return self.blocks[0](self.proj(x))


class NamedUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([Part()])

    def forward(self, x):
        return self.parts[0](x)


class NamedUNet(nn.Module):
    """Names the classes of its blocks, one of which holds parts that stand elsewhere too."""

    _no_split_modules = ("Block", "NamedUp")

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.ModuleList([Part()]), NamedUp()

    def forward(self, x):
        return self.up(self.down[0](x))


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        return self.linear(self.norm(x))


class Graph(nn.Module):
    """Layers with one linear map each."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([OneLayer(), OneLayer(), OneLayer()])
        self.out = nn.Linear(D, 2)

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return self.out(x)


class Twin(nn.Module):
    """A block of a list that has a twin outside of it, and a head of a container's class."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleList([nn.Sequential(nn.Linear(D, D), nn.ReLU()), Mlp()]), Block()])
        self.extra, self.mlp = Block(), Mlp()
        self.head = nn.Sequential(nn.Linear(D, D), nn.ReLU())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3))


def encoder(depth: int = 2, **options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, depth)


def in_each(blocks: list[str], *leaves: str) -> list[str]:
    return [f"{block}.{leaf}" for block in blocks for leaf in leaves]


def attention(name: str) -> list[str]:
    return in_each([name], "q_proj", "k_proj", "v_proj", "out_proj")


BLOCK = ("attn", "mlp.fc1", "mlp.fc2")
RES = ("conv1", "conv2", "time")
# Model, shape of an input, its blocks and its targets.
MODELS = {
    "a vision transformer": (ViT, (2, 4), blocks := ["blocks.0", "blocks.1"], in_each(blocks, *BLOCK)),
    "stages of blocks": (
        Swin,
        (2, D),
        blocks := ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"],
        in_each(blocks, *BLOCK),
    ),
    "blocks between stem and head": (Sandwich, (2, 4), ["1", "2"], in_each(["1", "2"], *BLOCK)),
    "blocks with units in a sequence": (
        lambda: nn.Sequential(Wide(), Wide()),
        (2, D),
        ["0", "1"],
        in_each(["0", "1"], "q", "k", "v", "o", "mlp.0.a", "mlp.0.b", "mlp.1.a", "mlp.1.b"),
    ),
    "blocks with experts": (
        lambda: nn.Sequential(Mixture(), Mixture()),
        (2, D),
        ["0", "1"],
        in_each(["0", "1"], "attn", *(f"experts.{i}.{leaf}" for i in range(3) for leaf in ("fc1", "fc2"))),
    ),
    "a U-Net": (
        UNet,
        None,
        blocks := ["down.0.resnets.0", "down.1.resnets.0", "mid.resnets.0", "up.0", "up.1"],
        in_each(
            [*blocks[:3], "up.0.resnets.0", "up.0.resnets.1", "up.1.resnets.0", "up.1.resnets.1"],
            *RES,
        ),
    ),
    "twins of what a named block holds": (
        NamedUNet,
        (2, D),
        ["down.0", "up"],
        in_each(["down.0", "up.parts.0"], "proj", *(f"blocks.0.{leaf}" for leaf in BLOCK)),
    ),
    "layers of one linear map": (
        Graph,
        (2, D),
        blocks := ["convs.0", "convs.1", "convs.2"],
        in_each(blocks, "linear"),
    ),
    "twins outside of lists, but not containers": (
        Twin,
        None,
        ["blocks.0", "blocks.1", "extra", "mlp"],
        [
            "blocks.0.0.0",
            "blocks.0.1.fc1",
            "blocks.0.1.fc2",
            "mlp.fc1",
            "mlp.fc2",
            *in_each(["blocks.1", "extra"], *BLOCK),
        ],
    ),
    "a plain MLP": (mlp, (2, 4), [], ["0", "2"]),
    "torch's encoder": (
        encoder,
        (2, 5, D),
        blocks := ["layers.0", "layers.1"],
        in_each(blocks, *attention("self_attn"), "linear1", "linear2"),
    ),
    "torch's encoder and decoder": (
        lambda: nn.Transformer(D, 2, 1, 1, 2 * D, dropout=0.0, batch_first=True),
        None,
        blocks := ["encoder.layers.0", "decoder.layers.0"],
        in_each(blocks, *attention("self_attn"), "linear1", "linear2")
        + in_each(["decoder.layers.0"], *attention("multihead_attn")),
    ),
    "one layer of torch's": (
        lambda: nn.TransformerDecoderLayer(D, 2, 2 * D),
        None,
        [""],
        ["linear1", "linear2", *attention("self_attn"), *attention("multihead_attn")],
    ),
}
models = pytest.mark.parametrize(("make", "shape", "blocks", "targets"), MODELS.values(), ids=MODELS.keys())
runs = pytest.mark.parametrize(
    ("make", "shape"), [(m, s) for m, s, *_ in MODELS.values() if s], ids=[k for k, v in MODELS.items() if v[1]]
)


def seeded(make) -> nn.Module:
    torch.manual_seed(0)
    return make()


@models
def test_blocks_and_targets(make, shape, blocks, targets):
    model = make()
    assert sorted(block_roots(model)) == sorted(blocks)
    assert sorted(find_targets(model).targets) == sorted(targets)


@models
@pytest.mark.parametrize("every", [1, 2], ids=["all layers", "every second layer"])
def test_blocks_and_targets_are_the_same_when_layers_have_changed_form(make, shape, blocks, targets, every):
    model = make()
    split_attention(model)
    before = find_targets(model)
    changed = list(before.targets.items())[::every]
    replace(model, [Swap(name, m, convert(m, Factored(1)).module) for name, m in changed])
    after = find_targets(model)
    assert (list(after.targets), after.skipped) == (list(before.targets), before.skipped)


def gradient_of(dense: dict[str, nn.Parameter], layer: str) -> torch.Tensor:
    """That of a layer's weight, or of its part of packed attention's."""
    owner, _, leaf = layer.rpartition(".")
    if f"{layer}.weight" in dense:
        return dense[f"{layer}.weight"].grad
    return dense[f"{owner}.in_proj_weight"].grad.chunk(3)[("q_proj", "k_proj", "v_proj").index(leaf)]


@runs
def test_all_forms_compute_what_the_dense_model_with_their_weights_computes(make, shape):
    model, twin = seeded(make), seeded(make)
    x = torch.randn(shape)
    drt = DynamicRank(model, DRTConfig(schedule="factored:2@0 adapter:2@1 dense@2"), max_steps=3)
    for step in range(3):
        drt.apply(step)
        twin.load_state_dict(dense_state_dict(model))
        y, expected = model(x), twin(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        model.zero_grad()
        twin.zero_grad()
        y.square().sum().backward()
        expected.square().sum().backward()
        dense = dict(twin.named_parameters())
        for name, p in model.named_parameters():
            if name in dense and p.grad is not None:
                torch.testing.assert_close(p.grad, dense[name].grad, rtol=1e-3, atol=1e-4)
            elif name.endswith(".U"):  # dL/dU = dL/dW V^T
                layer = name.removesuffix(".U")
                expected_grad = gradient_of(dense, layer) @ model.get_submodule(layer).V.T
                torch.testing.assert_close(p.grad, expected_grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"activation": "gelu", "norm_first": True}], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_fused_encoder_layer_is_right_with_low_rank_layers(monkeypatch, options, masked):
    model, twin = seeded(lambda: encoder(**options)).eval(), seeded(lambda: encoder(**options)).eval()
    DynamicRank(model, DRTConfig(schedule="factored:2@0"), max_steps=1).apply(0)
    twin.load_state_dict(dense_state_dict(model))
    x = torch.randn(2, 5, D)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    fused, calls = torch._transformer_encoder_layer_fwd, []
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: calls.append(1) or fused(*a))
    with torch.no_grad():
        y = model(x, src_key_padding_mask=padding)
        assert not calls  # the kernel, which would read the memory of weights, is not reached
        expected = twin(x, src_key_padding_mask=padding)
    assert calls  # and it is what the dense twin runs
    rows = slice(None) if padding is None else ~padding
    torch.testing.assert_close(y[rows], expected[rows], rtol=1e-4, atol=1e-5)


def test_the_unets_convolutions_and_time_embeddings_compute_in_factors_what_they_compute_densely():
    model, twin = seeded(UNet), seeded(UNet)
    x, t = torch.randn(2, D, 6), torch.rand(2, 1)
    DynamicRank(model, DRTConfig(schedule="factored:2@0"), max_steps=1).apply(0)
    twin.load_state_dict(dense_state_dict(model))
    torch.testing.assert_close(model(x, t), twin(x, t), rtol=1e-4, atol=1e-4)


def test_the_head_of_a_model_with_blocks_of_convolutions_alone_stays_dense():
    block = lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))  # noqa: E731
    model = nn.ModuleDict({"blocks": nn.Sequential(block(), block()), "head": mlp()})
    found = find_targets(model)
    assert all(name.startswith("blocks") for name in found.targets)
    assert {found.skipped[f"head.{i}"] for i in (0, 2, 4)} == {"outside of the blocks"}


def test_a_model_of_one_linear_layer_has_nothing_but_an_output():
    with pytest.raises(ValueError, match=r"1 outside of the blocks.*What is a block can be said by blocks"):
        find_targets(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


# ---- the setting


NAMED = {
    "a class": (["Mlp"], {"fc1", "fc2"}, "mlp"),
    "a pattern": ([r"layers\.1$"], {"attn", "fc1", "fc2", "downsample"}, "layers.1"),
    "the class of a layer": (["Linear"], {"attn", "fc1", "fc2", "downsample", "head"}, ""),
    "the model's own class": (["Swin"], {"attn", "fc1", "fc2", "downsample", "head"}, ""),
    "a class and a pattern": (["Mlp", "^head$"], {"fc1", "fc2", "head"}, ""),
}


@pytest.mark.parametrize(("entries", "leaves", "within"), NAMED.values(), ids=NAMED.keys())
def test_named_blocks_take_the_place_of_what_is_found(entries, leaves, within):
    model = Swin()
    linear = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    found = find_targets(model, blocks=entries)
    assert list(found.targets) == [n for n in linear if n.rpartition(".")[2] in leaves and within in n]
    assert set(found.skipped.values()) <= {"outside of the blocks"}


def test_named_blocks_hold_for_convolutions_too():
    found = find_targets(UNet(), blocks=["mid"])
    assert list(found.targets) == in_each(["mid.resnets.0"], *RES)


def test_named_blocks_are_narrowed_by_include_and_exclude():
    found = find_targets(Swin(), include=["fc"], exclude=["fc2"], blocks=["Stage"])
    assert list(found.targets) == [f"layers.{i}.blocks.{j}.mlp.fc1" for i, j in ((0, 0), (1, 0), (1, 1))]


@pytest.mark.parametrize("entry", ["Blok", "nosuch", "LayerNorm", "norm"])
def test_an_entry_that_names_nothing_is_refused_with_what_there_is(entry):
    with pytest.raises(
        ValueError,
        match=rf"blocks: '{entry}' is neither the class of a module of Graph that holds a linear layer .*, nor .*"
        r"Classes are ModuleList, OneLayer; names are convs, convs\.0, convs\.1, convs\.2\.",
    ):
        find_targets(Graph(), blocks=["OneLayer", entry])


def test_the_setting_reaches_every_way_to_select(tmp_path):
    only = {f"model.layers.{i}.mlp.{leaf}" for i in range(2) for leaf in ("gate_proj", "up_proj", "down_proj")}
    config = DRTConfig(schedule="factored@0 dense@2", rank=4, blocks=["LlamaMLP"])
    assert set(DynamicRank(tiny.llama(), config, 4).targets) == only
    assert {layer.name for layer in plan_compression(tiny.llama(), rank=4, blocks=["LlamaMLP"]).layers} == only
    assert {layer.name for layer in compress(tiny.llama(), rank=4, blocks=["LlamaMLP"]).layers} == only
    trainer = tiny.trainer(
        tmp_path, tiny.llama(), max_steps=4, drt_schedule="factored@0 dense@2", drt_rank=4, drt_blocks=["LlamaMLP"]
    )
    trainer.train()
    assert set(trainer.drt.targets) == only


def test_a_trainer_refuses_an_entry_that_names_nothing_before_the_run(tmp_path):
    with pytest.raises(ValueError, match="blocks: 'Nosuch' is neither the class"):
        tiny.trainer(tmp_path, tiny.llama(), drt_schedule="factored@0", drt_rank=4, drt_blocks=["Nosuch"])


class Tree(nn.Module):
    """Blocks of one class in a tree, without a list."""

    def __init__(self, depth: int):
        super().__init__()
        self.left = Tree(depth - 1) if depth else Residual()
        self.right = Tree(depth - 1) if depth else Residual()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)


class Scales(nn.Module):
    """A block with a short list of convolutions of its own beside four others."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.scales = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))])


def test_convolutions_of_blocks_that_stand_in_no_list_are_found_by_the_class_that_repeats():
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "tree": Tree(1), "head": nn.Linear(8, 2)})
    found = find_targets(model)
    halves = [f"tree.{side}.{other}" for side in ("left", "right") for other in ("left", "right")]
    assert sorted(found.targets) == sorted(in_each(halves, "a", "b"))
    assert found.skipped == {"stem": "outside of the blocks", "head": "outside of the blocks"}


def test_a_short_list_inside_a_block_of_convolutions_does_not_take_its_place():
    model = nn.ModuleDict({"blocks": nn.Sequential(Scales(), Scales())})
    blocks = ["blocks.0", "blocks.1"]
    assert sorted(find_targets(model).targets) == in_each(blocks, "k", "o", "q", "scales.0.0", "scales.0.2", "v")
