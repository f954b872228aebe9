"""The weights of fused experts in low-rank form: what they answer, as the dense ones would, and what they refuse."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from hf_drt.forms import Adapter, ExpertStack, Factored, StackWeight, convert
from hf_drt.forms.stack_weight import SURFACE

E, ROWS, COLUMNS, TOKENS = 4, 8, 12, 5
IDS = torch.tensor([2, 0, 3, 3, 1])
OFFSETS = torch.tensor([1, 3, 3, 5], dtype=torch.int32)
FORMS = {"factored": Factored(3), "adapter": Adapter(3, 12.0)}


def randn(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float32)


@pytest.fixture(params=[(form, transposed) for form in FORMS for transposed in (False, True)], ids=str)
def layer(request):
    form, transposed = request.param
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(E, ROWS, COLUMNS))
    low_rank = convert(ExpertStack(weight, transposed), FORMS[form]).module
    if form == "adapter":
        nn.init.normal_(low_rank.lora_B)
    return low_rank


# Everything that is allowed, of a weight (E, ROWS, COLUMNS), whatever it stands for.
PRODUCTS = {
    "linear": lambda w: F.linear(randn(TOKENS, COLUMNS), w[1]),
    "linear with a bias": lambda w: F.linear(randn(2, TOKENS, COLUMNS), w[1], randn(ROWS)),
    "linear with a named bias": lambda w: F.linear(randn(TOKENS, COLUMNS), w[1], bias=randn(ROWS)),
    "@ an expert": lambda w: randn(TOKENS, ROWS) @ w[2],
    "an expert @": lambda w: w[2] @ randn(COLUMNS, TOKENS),
    "matmul": lambda w: torch.matmul(randn(E, TOKENS, ROWS), w),
    "method matmul": lambda w: randn(E, TOKENS, ROWS).matmul(w),
    "bmm of all": lambda w: torch.bmm(randn(E, TOKENS, ROWS), w),
    "bmm of each token's": lambda w: torch.bmm(w[IDS], randn(TOKENS, COLUMNS, 1)),
    "method bmm": lambda w: w.bmm(randn(E, COLUMNS, 2)),
    "mm": lambda w: torch.mm(randn(TOKENS, ROWS), w[0]),
    "method mm": lambda w: w[0].mm(randn(COLUMNS, 2)),
    "a vector": lambda w: w[0] @ randn(COLUMNS),
    "__matmul__": lambda w: w[3].__matmul__(randn(COLUMNS, 2)),
    "__rmatmul__": lambda w: w[3].__rmatmul__(randn(2, ROWS)),
    "grouped": lambda w: F.grouped_mm(randn(TOKENS, ROWS), w, offs=OFFSETS),
    "grouped, transposed": lambda w: torch._grouped_mm(randn(TOKENS, COLUMNS), w.transpose(-2, -1), offs=OFFSETS),
    "grouped by transformers": lambda w: torch.ops.transformers.grouped_mm_fallback(randn(TOKENS, ROWS), w, OFFSETS),
    "index by a tensor": lambda w: randn(TOKENS, ROWS) @ w[torch.tensor(2)],
    "index by a number of numpy": lambda w: randn(TOKENS, ROWS) @ w[np.int64(2)],
    "index from behind": lambda w: randn(TOKENS, ROWS) @ w[-1],
    "index by int32": lambda w: w[IDS.int()] @ randn(COLUMNS, 1),
    "transpose": lambda w: randn(E, TOKENS, COLUMNS) @ w.transpose(1, 2),
    "torch.transpose": lambda w: randn(E, TOKENS, COLUMNS) @ torch.transpose(w, -1, -2),
    "swapaxes": lambda w: randn(TOKENS, COLUMNS) @ w[0].swapaxes(0, 1),
    "torch.swapaxes": lambda w: randn(TOKENS, COLUMNS) @ torch.swapaxes(w[0], 0, 1),
    "by keyword": lambda w: randn(E, TOKENS, COLUMNS) @ w.transpose(dim0=1, dim1=2),
    "mT": lambda w: randn(E, TOKENS, COLUMNS) @ w.mT,
    "T": lambda w: randn(TOKENS, COLUMNS) @ w[0].T,
    "t": lambda w: randn(TOKENS, COLUMNS) @ w[0].t(),
    "torch.t": lambda w: randn(TOKENS, COLUMNS) @ torch.t(w[0]),
    "float": lambda w: randn(TOKENS, ROWS) @ w[0].float(),
    "double": lambda w: randn(TOKENS, ROWS).double() @ w.double()[0],
    "to": lambda w: randn(TOKENS, ROWS).double() @ w.to(torch.float64)[0],
    "to by keyword": lambda w: randn(TOKENS, ROWS).double() @ w.to(dtype=torch.float64)[0],
    "type": lambda w: randn(TOKENS, ROWS).double() @ w.type(torch.float64)[0],
}
HALF = {
    "half": lambda w: randn(TOKENS, ROWS).half() @ w[0].half(),
    "bfloat16": lambda w: randn(TOKENS, ROWS).bfloat16() @ w.bfloat16()[0],
}
METADATA = {
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "shape": lambda w: w.shape,
    "shape of one": lambda w: w[1].shape,
    "shape of many": lambda w: w[IDS].mT.shape,
    "size": lambda w: (w.size(), w.size(0), w.size(-1)),
    "dim": lambda w: (w.dim(), w.ndim, w.numel(), w.element_size()),
    "kind": lambda w: (w.is_floating_point(), w.is_complex(), torch.is_floating_point(w), torch.is_complex(w)),
    "place": lambda w: (w.is_meta, w.is_cuda, w[0].layout, w.requires_grad, w.detach().grad),
    "data": lambda w: (w.data.requires_grad, w.data.shape),
    "detach": lambda w: (w.detach().requires_grad, w[0].detach().dtype),
}


def formed(layer):
    """All weights, as the dense parameter would be stored."""
    return layer.layout.stored(layer.matrix())


@pytest.mark.parametrize("use", PRODUCTS)
def test_products_are_those_of_the_dense_weights_and_so_are_their_gradients(layer, use):
    reference = copy.deepcopy(layer)
    got, expected = PRODUCTS[use](layer.weight), PRODUCTS[use](formed(reference))
    assert type(got) is torch.Tensor
    assert got.dtype == expected.dtype
    assert torch.allclose(got, expected, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(layer.named_parameters(), reference.parameters(), strict=True):
        assert (p.grad is None) == (not p.requires_grad), name
        if p.requires_grad:
            assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("use", HALF)
def test_products_in_half_precision_are_next_to_those_of_the_dense_weights(layer, use):
    got, expected = HALF[use](layer.weight), HALF[use](formed(layer))
    assert got.dtype == expected.dtype
    assert torch.allclose(got, expected, rtol=0.05, atol=0.2)


@pytest.mark.parametrize("use", METADATA)
def test_metadata_are_those_of_the_dense_weights(layer, use):
    assert METADATA[use](layer.weight) == METADATA[use](formed(layer))


@pytest.mark.parametrize("use", [*PRODUCTS, *METADATA])
def test_the_layer_itself_answers_in_their_place(layer, use):
    """As the experts' forward pass has it, which reads ``self.down_proj``."""
    every = PRODUCTS | METADATA
    if use in ("kind", "place", "__rmatmul__"):  # of a module, some are its own
        return
    got, expected = every[use](layer), every[use](formed(layer))
    assert torch.allclose(got, expected, atol=1e-5) if isinstance(got, torch.Tensor) else got == expected


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, StackWeight) for kind in types):
            self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_everything_on_the_list_is_tried_here(layer):
    with Seen() as seen:
        for use in (PRODUCTS | HALF | METADATA).values():
            use(layer.weight)
    missing = [func for func in SURFACE if func not in seen.functions]
    assert missing == []


class Custom(torch.autograd.Function):
    """Reaches a tensor subclass without __torch_function__."""

    @staticmethod
    def forward(context, weight):
        return weight.sum()


REFUSED = {
    "torch.Tensor.add": lambda w: w + 1,
    "torch.Tensor.mul": lambda w: 2 * w[0],
    "torch.cat": lambda w: torch.cat([w, w]),
    "torch.stack": lambda w: torch.stack((w[0], w[1])),
    "torch.Tensor.sum": lambda w: w.sum(),
    "torch.Tensor.abs": lambda w: w[0].abs(),
    "torch.Tensor.clone": lambda w: w.clone(),
    "torch.Tensor.contiguous": lambda w: w.contiguous(),
    "torch.Tensor.permute": lambda w: w.permute(0, 2, 1),
    "torch.Tensor.view": lambda w: w.view(-1),
    "torch.Tensor.chunk": lambda w: w.chunk(2, dim=-1),
    "torch.Tensor.data_ptr": lambda w: w.data_ptr(),
    "torch.Tensor.numpy": lambda w: w.detach().numpy(),
    "torch.Tensor.tolist": lambda w: w.tolist(),
    "torch.einsum": lambda w: torch.einsum("eij,ti->etj", w, randn(TOKENS, w.shape[1])),
    "torch.nn.functional.linear": lambda w: F.linear(randn(TOKENS, w.shape[2]), w),
    "torch.Tensor.__getitem__": lambda w: w[1:],
    "torch.Tensor.__getitem__, a mask": lambda w: w[torch.tensor([True, False, True, True])],
    "torch.Tensor.__getitem__, of one expert": lambda w: w[0][0],
    "torch.Tensor.__getitem__, many axes": lambda w: w[..., 0],
    "torch.Tensor.transpose": lambda w: w.transpose(0, 1),
    "torch.Tensor.T.__get__": lambda w: w.T,
    "torch.Tensor.to": lambda w: w.to(torch.int8),
    "torch.matmul": lambda w: torch.matmul(w, w.mT),
    "torch.bmm": lambda w: torch.bmm(randn(E, 2, w.shape[1]), w, out=randn(E, 2, w.shape[2])),
    "aten.sum": lambda w: Custom.apply(w.detach()),
}


@pytest.mark.parametrize("use", REFUSED)
def test_anything_else_is_refused_with_what_is_allowed(layer, use, monkeypatch):
    monkeypatch.setattr(type(layer), "matrix", lambda self: pytest.fail("W was formed"))
    with pytest.raises(NotImplementedError) as error:
        REFUSED[use](layer.weight)
    message = str(error.value)
    assert use.partition(",")[0].rpartition(".")[2].strip("_") in message
    assert "is not answered by the weights of fused experts in low-rank form. Allowed are shape, dtype, " in message
    assert "StackWeight(shape=" in message
    assert message.endswith("or keep them dense: exclude=['experts'].")


def test_an_attribute_that_is_not_on_the_list_is_not_there(layer):
    assert not hasattr(layer, "cumsum")
    with pytest.raises(AttributeError, match=r"Tensor\.cumsum\(\) is not answered by .* Allowed are shape"):
        layer.cumsum(0)
    with pytest.raises(AttributeError, match=r"has no attribute 'no_such_thing'"):
        layer.no_such_thing  # noqa: B018


@pytest.mark.parametrize("write", [lambda w: w.zero_(), lambda w: w[0].add_(1), lambda w: w.__setitem__(0, 1.0)])
def test_writing_is_refused(layer, write):
    with pytest.raises(RuntimeError, match="would write to the weight of a low-rank layer"):
        write(layer.weight)


def test_it_prints_without_being_formed(layer, monkeypatch):
    monkeypatch.setattr(type(layer), "matrix", lambda self: pytest.fail("W was formed"))
    shape = tuple(layer.weight.shape)
    assert repr(layer.weight) == f"StackWeight(shape={shape}, rank=3, dtype=torch.float32)"
