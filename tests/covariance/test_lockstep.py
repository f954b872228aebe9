"""Two models side by side on the same batches: moments and errors against inputs and outputs kept by hand."""

import copy

import pytest
import tiny
import torch
from torch import nn

from hf_drt.compress import compress
from hf_drt.covariance import chained, cross_moments, in_order, output_errors, whole_passes
from hf_drt.forms import layer_of
from hf_drt.targets import block_roots, find_targets

BATCHES = [tiny.batch(rows=4), tiny.batch(rows=6)]
NAMES = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]


@pytest.fixture(scope="module")
def pair():
    reference = tiny.llama().eval()
    model = copy.deepcopy(reference)
    compress(model, rank=4)
    return model, reference


def kept(model, name, batches, **called):
    """Inputs and outputs of one layer, as rows of all batches."""
    seen = []
    layer = layer_of(model, name)
    handle = layer.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return [torch.cat([part[i].flatten(0, -2) for part in seen]).double() for i in (0, 1)]


@pytest.mark.parametrize("last", [None, "model.layers.1"])
def test_moments_and_crossed_moments(pair, last):
    found = cross_moments(*pair, NAMES, whole_passes(*pair, BATCHES, last))
    assert list(found) == NAMES
    for name, (C, B) in found.items():
        (x, _), (before, _) = (kept(model, name, BATCHES) for model in pair)
        assert torch.allclose(C.double(), x.mT @ x / len(x), atol=1e-6)
        assert torch.allclose(B.double(), before.mT @ x / len(x), atol=1e-6)
    assert not torch.allclose(*found[NAMES[1]], atol=1e-3)


def test_the_passes_end_after_the_last_module_that_is_needed(pair):
    calls = []
    handles = [model.lm_head.register_forward_hook(lambda *_: calls.append(1)) for model in pair]
    cross_moments(*pair, NAMES, whole_passes(*pair, BATCHES, "model.layers.1"))
    assert len(calls) == 2  # of the first batch alone, which shows how often the block is called
    for handle in handles:
        handle.remove()


def test_errors_of_outputs(pair):
    errors = output_errors(*pair, NAMES, whole_passes(*pair, BATCHES))
    for name in NAMES:
        (_, y), (_, before) = (kept(model, name, BATCHES) for model in pair)
        assert errors[name] == pytest.approx(((y - before).norm() / before.norm()).item(), rel=1e-5)
    assert output_errors(pair[1], pair[1], NAMES, whole_passes(pair[1], pair[1], BATCHES)) == dict.fromkeys(NAMES, 0.0)


def test_layers_come_in_the_order_of_their_calls_with_those_of_one_input_together(pair):
    names = [name for name in find_targets(pair[1]).targets if name.startswith("model.layers.1.")]
    found = in_order(pair[1], reversed(names), whole_passes(*pair, BATCHES))
    ends = [sorted(name.removeprefix("model.layers.1.") for name in group) for group in found]
    attention = [f"self_attn.{kind}_proj" for kind in "kqv"]
    assert ends == [attention, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
    torch.manual_seed(0)
    model = Twice()
    assert in_order(model, ["idle", "shared"], whole_passes(model, model, [torch.randn(5, 6)])) == [
        ["shared"],
        ["idle"],
    ]


class Twice(nn.Module):
    """A layer that is called twice in a forward pass, and one that never is."""

    def __init__(self):
        super().__init__()
        self.shared, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.shared(self.shared(x).relu())


def test_a_layer_that_is_called_twice_is_compared_call_by_call():
    torch.manual_seed(0)
    reference, model = Twice(), Twice()
    x = torch.randn(5, 6)
    found = cross_moments(model, reference, ["shared", "idle"], whole_passes(model, reference, [x]))
    assert list(found) == ["shared"]
    each = [torch.cat([x, m.shared(x).relu()]) for m in (reference, model)]
    assert torch.allclose(found["shared"].B, each[0].mT @ each[1] / 10, atol=1e-6)
    assert list(output_errors(model, reference, ["shared", "idle"], whole_passes(model, reference, [x]))) == ["shared"]


def test_convolutions_go_by_their_patches():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3))
    model = copy.deepcopy(reference)
    nn.init.normal_(model[0].weight)
    x = torch.randn(2, 2, 6, 6)
    C, B = cross_moments(model, reference, ["1"], whole_passes(model, reference, [x]))["1"]
    mine, theirs = (nn.functional.unfold(m[0](x), 3).transpose(0, 1).flatten(1) for m in (model, reference))
    assert torch.allclose(C, mine @ mine.mT / mine.shape[1], atol=1e-5)
    assert torch.allclose(B, theirs @ mine.mT / mine.shape[1], atol=1e-5)


def test_modes_are_put_back(pair):
    models = [copy.deepcopy(model).train() for model in pair]
    models[0].model.layers[0].eval()
    output_errors(*models, NAMES, whole_passes(*models, BATCHES))
    assert models[1].training
    assert models[0].training
    assert not models[0].model.layers[0].training


# ---- block by block


def outputs(model, name, batches):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, y: seen.append(_first(y)))
    with torch.no_grad():
        for batch in batches:
            model.eval()(**batch)
    handle.remove()
    return seen


def _first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "vit", "mixtral"])
def test_a_chain_gives_each_block_what_it_gets_in_the_model(kind):
    """With a mask of padding, and blocks that change on the way, as they do while they are fitted."""
    reference = getattr(tiny, kind)().eval()
    model = copy.deepcopy(reference)
    compress(model, rank_ratio=0.25, rank_multiple=2)
    batches = [tiny.batch(kind, rows=3), tiny.batch(kind, rows=2)]
    if kind in ("llama", "bert", "mixtral"):
        batches[0]["attention_mask"] = torch.tensor([[1] * 5 + [0] * 3, [1] * 8, [1] * 7 + [0]])
    names = list(block_roots(model))
    chain = chained(model, reference, names, batches)
    assert chain is not None
    for name in names:
        with torch.no_grad():
            for layer in model.get_submodule(name).parameters():
                layer.mul_(1.1)
            made = [(theirs(), mine()) for theirs, mine in chain.passes(name)]
        for side, each in ((0, reference.eval()), (1, model)):
            assert all(map(torch.equal, [pair[side] for pair in made], outputs(each, name, batches)))
        chain.move_on(name)


def test_what_is_no_chain_is_told():
    """A decoder that is given an encoder's output; blocks in another order; blocks that see what blocks have done."""
    encoder = tiny.t5()
    assert chained(encoder, encoder, list(block_roots(encoder)), [tiny.batch("t5")]) is None
    model = tiny.llama()
    names = list(block_roots(model))
    assert chained(model, model, names, BATCHES) is not None
    assert chained(model, model, names[::-1], BATCHES) is None
    assert chained(model, model, ["model.layers.0.mlp"], BATCHES) is not None  # one block is a chain
    assert chained(model, model, ["model.layers.0.mlp", "model.layers.1.mlp"], BATCHES) is None

    class Skips(nn.Module):
        """Each block is also given the first one's output."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x):
            first = None
            for block in self.blocks:
                x = block(x, first)
                first = x if first is None else first
            return x

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, first):
            return self.linear(x) if first is None else self.linear(x) + first

    torch.manual_seed(0)
    reference, model = Skips(), Skips()
    assert chained(model, reference, [f"blocks.{i}" for i in range(3)], [torch.randn(2, 6)]) is None


def test_a_chain_leaves_out_the_cache_of_keys_and_values():
    """It would grow with each time that a block is called."""
    model = tiny.llama()
    assert model.config.use_cache
    chain = chained(model, model, list(block_roots(model)), BATCHES)
    name = "model.layers.0"
    twice = [[(theirs(), mine()) for theirs, mine in chain.passes(name)] for _ in range(2)]
    assert all(torch.equal(a, b) for one, two in zip(*twice, strict=True) for a, b in zip(one, two, strict=True))
