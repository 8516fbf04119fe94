import pytest
import torch
import torch.nn.functional as F

from e3va import ops
from tests.oracles import TOLERANCE, relative_error


def make_arguments(shape, dtype=torch.float64):
    C = shape[-1]
    h = torch.randn(shape, dtype=torch.float64).to(dtype)
    weight, bias, reduction = torch.randn(4 * C), torch.randn(4 * C), torch.randn(2 * C, 4 * C)
    return h, weight.double(), bias.double(), 1e-5, reduction.double()


def oracle(h, weight, bias, eps, reduction):
    """Four neighbours gathered token by token."""
    B, H, W, C = h.shape
    rows = []
    for i in range(0, H, 2):
        for j in range(0, W, 2):
            neighbours = [
                h[:, i + down, j + right] if i + down < H and j + right < W else h.new_zeros(B, C)
                for right in (0, 1)
                for down in (0, 1)
            ]
            rows.append(torch.cat(neighbours, -1))
    x = torch.stack(rows, 1).view(B, (H + 1) // 2, (W + 1) // 2, 4 * C)
    return F.layer_norm(x, (4 * C,), weight, bias, eps) @ reduction.t()


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 5, 6), (1, 4, 6, 8), (0, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_float64_forward_and_backward(shape, dtype):
    h, *weights = make_arguments(shape, dtype)
    exact = h.double().requires_grad_()
    expected = oracle(exact, *weights)
    G = torch.randn(expected.shape).to(dtype)
    (expected_grad,) = torch.autograd.grad(expected, exact, G.double())

    ours = h.clone().requires_grad_()
    actual = ops.patch_merging(ours, *weights)
    (actual_grad,) = torch.autograd.grad(actual, ours, G)
    assert actual.dtype == actual_grad.dtype == dtype
    assert relative_error(actual, expected) <= TOLERANCE[dtype]
    assert relative_error(actual_grad, expected_grad) <= 2 * TOLERANCE[dtype]


def test_gradcheck():
    h, *weights = make_arguments((2, 3, 3, 2))
    assert torch.autograd.gradcheck(lambda h: ops.patch_merging(h, *weights), (h.requires_grad_(),))


def test_opcheck():
    h, *weights = make_arguments((2, 3, 5, 4), torch.float32)
    args = (h.requires_grad_(), *(w.float() if isinstance(w, torch.Tensor) else w for w in weights))
    torch.library.opcheck(torch.ops.e3va.patch_merging.default, args)
    G = torch.randn(2, 2, 3, 8)
    torch.library.opcheck(torch.ops.e3va.patch_merging_backward.default, (G, h.detach(), *args[1:]))


def test_saves_only_its_input():
    h, *weights = make_arguments((1, 4, 6, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.patch_merging(h.requires_grad_(), *weights)
    own = {h.data_ptr(), *(w.data_ptr() for w in weights if isinstance(w, torch.Tensor))}
    assert {t.data_ptr() for t in saved} <= own


def test_bad_input():
    h, weight, bias, eps, reduction = make_arguments((1, 2, 2, 4))
    with pytest.raises(ValueError, match="reduction must have shape"):
        ops.patch_merging(h, weight, bias, eps, reduction[:, :-1])
    with pytest.raises(ValueError, match="h must have shape"):
        ops.patch_merging(h[0], weight, bias, eps, reduction)
