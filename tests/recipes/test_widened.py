"""Products in bfloat16 by way of float32: bits of exact sums, rounded once; float32 is left alone."""

import torch
import torch.nn.functional as F
from widened import Widened


def test_products_in_bfloat16_are_exact_sums_rounded_once():
    x, w, b = (torch.randn(*shape).bfloat16() for shape in ((6, 32), (16, 32), (16,)))
    with Widened():
        found, biased, batched = x @ w.T, F.linear(x, w, b), torch.bmm(x[None], w.T[None])
        wide = x.float() @ w.float().T
    exact = x.double() @ w.double().T
    assert found.dtype == biased.dtype == batched.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    half_a_bit = 2.0**-8 * (1 + 2**-8)
    assert ((found.double() - exact).abs() <= half_a_bit * exact.abs() + 1e-5).all()
    assert ((biased.double() - exact - b.double()).abs() <= half_a_bit * (exact + b.double()).abs() + 1e-5).all()
    assert torch.equal(batched[0], found)


def test_gradients_and_attention_keep_their_dtypes():
    q, k, v = (torch.randn(1, 2, 8, 16).bfloat16().requires_grad_() for _ in range(3))
    with Widened():
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y.sum().backward()
    expected = [t.detach().float().requires_grad_() for t in (q, k, v)]
    reference = F.scaled_dot_product_attention(*expected, is_causal=True)
    reference.sum().backward()
    assert y.dtype == q.grad.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(q.grad.float(), expected[0].grad, rtol=2**-5, atol=2**-5)
