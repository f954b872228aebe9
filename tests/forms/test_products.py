"""A product of one's own: a class in this file, and nothing else, takes part in all that the built-in ones do."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from transformers import HfArgumentParser

from hf_drt import DRTConfig, DRTTrainingArguments, DynamicRank
from hf_drt.checkpoint import declare
from hf_drt.export import dense_state_dict, save_peft_adapter
from hf_drt.forms import (
    PRODUCTS,
    Adapter,
    Dense,
    Factored,
    LayerShape,
    Product,
    convert,
    effective_weight,
    empty_like,
    flops_of,
    form_of,
    parameters_of,
    product_table,
    trainable_weights,
    weight_shape,
)
from hf_drt.linalg import truncated_svd
from hf_drt.planning import resolve_form


class Kronecker(Product):
    """``W = sum_k kron(A_k, B_k)`` with ``A (r, m1, n1)`` and ``B (r, m2, n2)``: of full rank from r = 1 on.

    Decomposed by the SVD of W with its blocks as rows (Van Loan and Pitsianis 1993).
    """

    name = "kronecker"
    help = "a sum of Kronecker products"
    weights = "r (m1 n1 + m2 n2)"
    found_by = "SVD of the rearranged matrix"
    roles = ("right", "left")

    def shapes(self, form, shape):
        (m1, m2), (n1, n2) = split(shape.d_out), split(shape.d_in)
        right, left = self.names(form.adapts)
        return {left: (form.rank, m1, n1), right: (form.rank, m2, n2)}

    def rank_limit(self, shape):
        (m1, m2), (n1, n2) = split(shape.d_out), split(shape.d_in)
        return min(m1 * n1, m2 * n2)

    def decompose(self, form, source):
        U, S, Vh, error = truncated_svd(rearranged(source.matrix()), form.rank)
        (m1, m2), (n1, n2) = (split(size) for size in source.shape)
        root = S.sqrt()[:, None]
        right = (root * Vh).reshape(form.rank, m2, n2).contiguous()
        return right, (root * U.mT).reshape(form.rank, m1, n1).contiguous(), error

    def matrix(self, tensors):
        right, left = tensors
        return torch.einsum("kab,kcd->acbd", left, right).flatten(2).flatten(0, 1)


def split(n):
    """The two factors of n that are nearest to each other."""
    small = max(d for d in range(1, math.isqrt(n) + 1) if n % d == 0)
    return small, n // small


def rearranged(W):
    """``(m1 n1, m2 n2)``: one row for each block."""
    (m1, m2), (n1, n2) = (split(size) for size in W.shape)
    return W.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)


@pytest.fixture(autouse=True)
def kronecker():
    PRODUCTS.add("kronecker", Kronecker())
    yield
    PRODUCTS.remove("kronecker")


LAYERS = {
    "linear": (lambda: nn.Linear(12, 30), (5, 12)),
    "convolution": (lambda: nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=1), (2, 6, 8, 7)),
}
# Made by a test, which has the product registered.
FORMS = {
    "factored": lambda: Factored(2, "kronecker"),
    "adapter": lambda: Adapter(2, 6.0, "zero", "kronecker"),
    "principal adapter": lambda: Adapter(2, 6.0, "principal", "kronecker"),
}
OTHERS = {"dense": Dense, "svd": lambda: Factored(5), "lora": lambda: Adapter(3, 8.0)} | FORMS
layers = pytest.mark.parametrize("kind", LAYERS)
forms = pytest.mark.parametrize("form", FORMS)


def made(kind):
    torch.manual_seed(0)
    make, size = LAYERS[kind]
    return make(), torch.randn(size)


# ---- one layer


@layers
def test_its_error_is_that_of_the_nearest_sum_and_at_full_rank_there_is_none(kind):
    layer, x = made(kind)
    y, W = layer(x), effective_weight(layer).double()
    tail = torch.linalg.svdvals(rearranged(W))[2:].square().sum().sqrt() / W.norm()
    low = convert(copy.deepcopy(layer), Factored(2, "kronecker"))
    assert low.error == pytest.approx(tail.item(), abs=1e-5)
    terms = zip(low.module.kronecker_left.double(), low.module.kronecker_right.double(), strict=True)
    expected = sum(torch.kron(A, B) for A, B in terms)
    assert torch.allclose(effective_weight(low.module).double(), expected, atol=1e-6)
    limit = PRODUCTS["kronecker"].rank_limit(weight_shape(layer))
    whole = convert(layer, Factored(limit, "kronecker")).module
    assert (whole(x) - y).abs().max() <= 1e-5
    with pytest.raises(ValueError, match=rf"rank must lie in 1\.\.{limit} for a layer of shape"):
        convert(whole, Factored(limit + 1, "kronecker"))


@layers
@forms
def test_it_computes_the_dense_layer_with_its_effective_weight(kind, form):
    """Outputs and gradients against autograd of the dense layer, in training and in evaluation."""
    dense, x = made(kind)
    layer = convert(copy.deepcopy(dense), FORMS[form]()).module
    nn.init.normal_(trainable_weights(layer)[0], std=0.1)  # nothing is zero
    weights, x = list(trainable_weights(layer)), x.requires_grad_()
    y = layer(x)
    expected = torch.func.functional_call(dense, {"weight": layer.weight * 1}, (x,))
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(layer.eval()(x), y, atol=1e-5)
    gradients = torch.autograd.grad(y.square().sum(), [x, *weights])
    for gradient, other in zip(gradients, torch.autograd.grad(expected.square().sum(), [x, *weights]), strict=True):
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


@layers
@forms
@pytest.mark.parametrize("other", OTHERS)
def test_every_way_between_it_and_other_forms(kind, form, other):
    """The function stays, but for what the new form's own decomposition loses of it."""
    layer, x = made(kind)
    form, other = FORMS[form](), OTHERS[other]()
    layer = convert(layer, form).module
    y, W = layer(x), effective_weight(layer).clone()
    conversion = convert(layer, other)
    lost = ((effective_weight(conversion.module) - W).norm() / W.norm()).item()
    assert conversion.error == pytest.approx(lost, abs=1e-5)
    if isinstance(other, Factored) and other.decomposition == "svd":
        tail = torch.linalg.svdvals(W.double())[other.rank :].square().sum().sqrt() / W.norm()
        assert lost == pytest.approx(tail.item(), abs=1e-5)
    elif not isinstance(other, Factored) or form == other:
        assert (conversion.module(x) - y).abs().max() <= 1e-5


@layers
@forms
def test_size_state_and_cost(kind, form):
    form = FORMS[form]()
    layer = convert(made(kind)[0], form).module
    shape = weight_shape(layer)
    trained = sum(p.numel() for p in trainable_weights(layer))
    assert parameters_of(form, shape) == trained
    assert flops_of(form, shape) == 3 * trained + (2 * math.prod(shape) if isinstance(form, Adapter) else 0)
    empty = empty_like(made(kind)[0], form)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.weight + 0, layer.weight + 0)
    with pytest.raises(RuntimeError, match=r"in another in the checkpoint, which holds"):
        convert(made(kind)[0], type(form)(2)).module.load_state_dict(layer.state_dict(), strict=False)
    assert copy.deepcopy(layer).product is layer.product


def test_break_even_is_where_it_holds_as_much_as_the_matrix():
    shape = LayerShape(30, 12)
    limit = PRODUCTS["kronecker"].break_even(shape)
    assert limit == 30 * 12 / (5 * 3 + 6 * 4)
    config = DRTConfig(decomposition="kronecker", rank=math.ceil(limit))
    assert resolve_form("factored", shape, config, "", None) == Dense()
    config = DRTConfig(decomposition="kronecker", rank=math.floor(limit))
    assert resolve_form("factored", shape, config, "", None) == Factored(9, "kronecker")


def test_fused_experts_take_the_svd_in_its_place():
    config = DRTConfig(decomposition="kronecker", rank=2)
    assert resolve_form("factored", LayerShape(30, 12, experts=4), config, "", None) == Factored(2)


# ---- a model


def run(folder, schedule="dense@0 factored@2 adapter@4 dense@6", **changes):
    settings = {"max_steps": 8, "drt_schedule": schedule, "drt_decomposition": "kronecker", "drt_rank": 2}
    return tiny.trainer(folder, **{**settings, **changes})


def test_a_model_trains_switches_and_resumes_with_the_same_bits(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "drt_export": "native"}
    whole = run(tmp_path / "whole", **settings)
    whole.train()
    errors = [entry["drt_truncation_error"] for entry in whole.state.log_history if "drt_truncation_error" in entry]
    assert len(errors) == 4
    assert 0 < errors[1] < 1
    assert not any(type(form_of(module)) is not Dense for module in whole.model.modules())
    resumed = run(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def in_form(kind="factored", config="llama"):
    model = tiny.MODELS[config]()
    drt = DynamicRank(model, DRTConfig(schedule=f"{kind}@0", decomposition="kronecker", rank=2), 2)
    drt.apply(0)
    return model, drt


@pytest.mark.parametrize("kind", ["factored", "adapter"])
def test_what_is_saved_computes_the_same(tmp_path, kind):
    model, drt = in_form(kind)
    if kind == "adapter":
        for p in (p for name, p in model.named_parameters() if name.endswith("left")):
            nn.init.normal_(p, std=0.1)
    declare(model)
    y = tiny.logits(model, tiny.batch())
    model.save_pretrained(tmp_path)
    block = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["layers"]
    assert {entry["decomposition"] for entry in block.values()} == {"kronecker"}
    native = type(model).from_pretrained(tmp_path)
    assert {form_of(native.get_submodule(name)).decomposition for name in drt.targets} == {"kronecker"}
    assert torch.equal(tiny.logits(native, tiny.batch()), y)
    dense = tiny.llama()
    dense.load_state_dict(dense_state_dict(model))
    assert (tiny.logits(dense, tiny.batch()) - y).abs().max() <= 1e-5


def test_effective_ranks_are_those_of_its_matrix():
    _, drt = in_form()
    for name, rank in drt.effective_ranks().items():
        values = torch.linalg.svdvals(effective_weight(drt.model.get_submodule(name)).double())
        shares = values / values.sum()
        assert rank == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-4)


def test_what_it_does_not_have_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"frobenius_decay is the decay of a product U V, and decomposition='kronecker'"
    ):
        DynamicRank(
            tiny.llama(), DRTConfig(schedule="factored@0", decomposition="kronecker", rank=2, frobenius_decay=True), 2
        )
    model, _ = in_form("adapter")
    with pytest.raises(ValueError, match=r"has an adapter that PEFT does not have: its LoRA is of decomposition 'svd'"):
        save_peft_adapter(model, tmp_path)


def test_moments_start_anew():
    model, settings = (
        tiny.llama(),
        DRTConfig("dense@0 factored@1", decomposition="kronecker", rank=2, moments="project"),
    )
    drt = DynamicRank(model, settings, 2)
    drt.apply(0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(**tiny.batch()).loss.backward()
    optimizer.step()
    drt.begin_step(1, optimizer)
    weights = [w for name in drt.targets for w in trainable_weights(model.get_submodule(name))]
    assert weights
    assert not any(optimizer.state.get(w) for w in weights)
    assert optimizer.state[model.lm_head.weight]


# ---- by its name


def test_it_stands_in_help_errors_and_tables():
    listed = "'kronecker' (a sum of Kronecker products)"
    assert listed in " ".join(HfArgumentParser(DRTTrainingArguments).format_help().split())
    assert listed in DRTConfig.__dataclass_fields__["decomposition"].metadata["help"]
    for make in (lambda: DRTConfig(decomposition="qr"), lambda: Factored(2, "qr")):
        with pytest.raises(ValueError, match="decomposition must be one of svd, tucker, cp, kronecker, got 'qr'"):
            make()
    assert "| `kronecker` | a sum of Kronecker products | r (m1 n1 + m2 n2) | SVD of the rearranged matrix |" in (
        product_table()
    )


def test_it_stands_in_the_help_of_the_command(tmp_path):
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]; sys.argv = ['hf-drt', 'plan', '--help']\n"
        "import test_products\n"
        "test_products.PRODUCTS.add('kronecker', test_products.Kronecker())\n"
        "from hf_drt.cli.app import app; app()"
    )
    here = Path(__file__).parent
    out = subprocess.run([sys.executable, "-c", script, here, here.parent], capture_output=True, text=True, check=True)
    assert "'kronecker' (" in " ".join(out.stdout.split())


def test_the_table_of_the_documentation_is_that_of_the_registry():
    PRODUCTS.remove("kronecker")
    try:
        table = product_table()
    finally:
        PRODUCTS.add("kronecker", Kronecker())
    assert table in (Path(__file__).parents[2] / "docs" / "convolutions.md").read_text()


@pytest.mark.parametrize("adapts", [False, True])
def test_every_product_has_a_tensor_by_whose_name_all_others_refuse_its_weights(adapts):
    for product in PRODUCTS.values():
        others = (set(other.names(adapts)) for other in PRODUCTS.values() if other is not product)
        assert all(set(product.needed(adapts)) - names for names in others), product.name
