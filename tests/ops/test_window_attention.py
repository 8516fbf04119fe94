import pytest
import torch

import e3va
from e3va import ops
from e3va.ops.backends import native
from tests.oracles import TOLERANCE, relative_error


def make_arguments(B, H, W, heads, head_dim, window, dtype=torch.float64):
    C3 = 3 * heads * head_dim
    qkv = torch.randn(B, H, W, C3, dtype=torch.float64)
    bias, table = torch.randn(C3), torch.randn((2 * window - 1) ** 2, heads)
    return qkv.to(dtype), bias.double().to(dtype), table.double().to(dtype)


def oracle(qkv, qkv_bias, table, window, shift):
    """Query by query: who shares its window and its region, by coordinates alone."""
    B, H, W, C3 = qkv.shape
    heads = table.shape[1]
    rows, columns = -(-H // window) * window, -(-W // window) * window
    padded = qkv_bias.expand(B, rows, columns, C3).clone()
    padded[:, :H, :W] = qkv
    q, k, v = padded.unflatten(-1, (3, heads, -1)).unbind(3)

    def place(position, size):
        """Window, place within it and region of a position along one axis."""
        shifted = (position - shift) % size
        region = (shifted >= size - window) + (shifted >= size - shift) if shift else 0
        return shifted // window, shifted % window, int(region)

    grid = [(i, j) for i in range(rows) for j in range(columns)]
    places = {(i, j): (place(i, rows), place(j, columns)) for i, j in grid}
    out = qkv.new_zeros(B, H, W, heads, C3 // 3 // heads)
    for i in range(H):
        for j in range(W):
            (wi, pi, ri), (wj, pj, rj) = places[i, j]
            scores, values = [], []
            for a, b in grid:
                (wa, pa, ra), (wb, pb, rb) = places[a, b]
                if (wa, wb) != (wi, wj):
                    continue
                bias = table[(pi - pa + window - 1) * (2 * window - 1) + pj - pb + window - 1]
                score = (q[:, i, j] * k[:, a, b]).sum(-1) * q.shape[-1] ** -0.5 + bias
                scores.append(score if (ra, rb) == (ri, rj) else score - 100)
                values.append(v[:, a, b])
            weights = torch.stack(scores).softmax(0)
            out[:, i, j] = (weights[..., None] * torch.stack(values)).sum(0)
    return out.flatten(-2)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("B, H, W", [(1, 1, 1), (2, 5, 7), (1, 6, 3), (1, 2, 8), (0, 4, 4)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_oracle(B, H, W, shift, dtype):
    arguments = make_arguments(B, H, W, heads=2, head_dim=4, window=3, dtype=dtype)
    expected = oracle(*(a.double() for a in arguments), 3, shift)
    actual = ops.window_attention(*arguments, 3, shift)
    assert actual.dtype == dtype and actual.is_contiguous()
    assert relative_error(actual, expected) <= 2 * TOLERANCE[dtype]


def test_opcheck():
    for shift in (0, 1):
        arguments = make_arguments(2, 5, 4, 2, 4, 3, torch.float32)
        torch.library.opcheck(torch.ops.e3va.window_attention.default, (*arguments, 3, shift))
        strided = (arguments[0].mT.contiguous().mT, *arguments[1:], 3, shift)
        torch.library.opcheck(torch.ops.e3va.window_attention.default, strided)


def test_has_no_backward_and_says_so():
    qkv, bias, table = make_arguments(1, 3, 3, 2, 4, 3)
    with pytest.raises(RuntimeError, match="no backward, but qkv requires a gradient"):
        ops.window_attention(qkv.requires_grad_(), bias, table, 3, 0)


def test_bad_input():
    qkv, bias, table = make_arguments(1, 4, 4, 2, 4, 3)
    with pytest.raises(ValueError, match=r"shift must be in \[0, 3\), got 3"):
        ops.window_attention(qkv, bias, table, 3, 3)
    with pytest.raises(ValueError, match="position_bias must have shape"):
        ops.window_attention(qkv, bias, table, 4, 0)
    with pytest.raises(ValueError, match="heads"):
        ops.window_attention(qkv, bias, table.repeat(1, 5), 3, 0)
    with pytest.raises(ValueError, match="for 0 heads"):
        ops.window_attention(qkv, bias, table[:, :0], 3, 0)
    with pytest.raises(ValueError, match="window must be positive, got 0"):
        ops.window_attention(qkv, bias, table, 0, 0)
    with pytest.raises(TypeError, match="qkv must be of a floating dtype"):
        ops.window_attention(qkv.long(), bias, table, 3, 0)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_biases_elsewhere_are_refused(backend):
    if backend == "native" and native.why_not(torch.device("cpu"), torch.float32):
        pytest.skip("compiled kernels left untested")
    qkv, *biases = make_arguments(1, 4, 4, 2, 4, 3, torch.float32)
    with e3va.backend(backend):
        ops.window_attention(qkv, *biases, 3, 0)  # which is remembered as right
        for i, name in enumerate(("qkv_bias", "position_bias")):
            given = [bias.to("meta") if j == i else bias for j, bias in enumerate(biases)]
            with pytest.raises(ValueError, match=f"{name} must be on the device of qkv, cpu"):
                ops.window_attention(qkv, *given, 3, 0)
