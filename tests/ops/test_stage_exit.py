import pytest
import torch
import torch.nn.functional as F

from e3va import ops
from tests.oracles import TOLERANCE, relative_error


def make_arguments(shape, dtype=torch.float64, merging=True):
    C = shape[-1]
    h = (torch.randn(shape, dtype=torch.float64) * 3 + 1).to(dtype)
    # Weights near one and zero, as they are after some training, for 16 bits to say what h was.
    weight, bias = 1 + 0.3 * torch.randn(C), 0.3 * torch.randn(C)
    merge = torch.randn(4 * C), torch.randn(4 * C), 1e-5, torch.randn(2 * C, 4 * C)
    return h, weight, bias, 1e-5, *(merge if merging else ())


def wide(arguments):
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def oracle(h, weight, bias, eps, *merging):
    p = F.layer_norm(h, h.shape[-1:], weight, bias, eps)
    return p, oracle_merging(h, *merging) if merging else h.new_empty(0)


def oracle_merging(h, weight, bias, eps, reduction):
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


@pytest.mark.parametrize("merging", [True, False], ids=["merging", "last"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 3, 5, 6), (1, 4, 6, 8), (0, 3, 2, 4)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_float64_forward_and_backward(shape, dtype, merging):
    arguments = make_arguments(shape, dtype, merging)
    exact = wide(arguments)
    trained = [value.requires_grad_() for value in exact[:3]]
    expected = oracle(*exact)
    G = [torch.randn(out.shape).to(dtype) for out in expected]
    used = slice(0, 2 if merging else 1)
    wanted = torch.autograd.grad(expected[used], trained, [g.double() for g in G[used]])

    if dtype == torch.float64:
        arguments = wide(arguments)
    ours = [value.detach().clone().requires_grad_() for value in arguments[:3]]
    actual = ops.stage_exit(*ours, *arguments[3:])
    found = torch.autograd.grad(actual[used], ours, G[used])
    for a, e in zip(actual[used], expected[used], strict=True):
        assert a.dtype == dtype
        assert relative_error(a, e) <= TOLERANCE[dtype]
    assert merging or actual[1].numel() == 0
    for a, e, value in zip(found, wanted, ours, strict=True):
        assert a.dtype == value.dtype
        assert relative_error(a, e) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sums_over_a_large_map_lose_nothing(dtype):
    """A sum in 16 bits would soon be too large for the next token's gradient to change it."""
    h, weight, bias, eps, *_ = wide(make_arguments((1, 100, 168, 4), dtype))
    G = torch.rand(h.shape).to(dtype)
    trained = [value.requires_grad_() for value in (h, weight, bias)]
    wanted = torch.autograd.grad(oracle(*trained, eps)[0], trained, G.double())
    ours = [value.detach().to(dtype).requires_grad_() for value in trained]
    found = torch.autograd.grad(ops.stage_exit(*ours, eps)[0], ours, G)
    for a, e in zip(found, wanted, strict=True):
        assert relative_error(a, e) <= 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("used", [0, 1])
def test_one_way_alone_may_be_used(used):
    arguments = wide(make_arguments((2, 3, 5, 6)))
    ours = [value.clone().requires_grad_() for value in arguments[:3]]
    theirs = [value.clone().requires_grad_() for value in arguments[:3]]
    ours_out = ops.stage_exit(*ours, *arguments[3:])[used].square().sum()
    theirs_out = oracle(*theirs, *arguments[3:])[used].square().sum()
    found = torch.autograd.grad(ours_out, ours)
    wanted = torch.autograd.grad(theirs_out, theirs, materialize_grads=True)
    for a, e in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, e)


def test_gradcheck():
    h, weight, bias, *rest = wide(make_arguments((2, 3, 3, 3)))
    trained = [value.requires_grad_() for value in (h, weight, bias)]
    assert torch.autograd.gradcheck(lambda *values: ops.stage_exit(*values, *rest), trained)


@pytest.mark.parametrize("merging", [True, False], ids=["merging", "last"])
def test_opcheck(merging):
    h, weight, bias, *rest = make_arguments((2, 3, 5, 4), torch.float32, merging)
    rest = rest if merging else [*rest, None, None, 0.0, None]
    trained = [value.requires_grad_() for value in (h, weight, bias)]
    torch.library.opcheck(torch.ops.e3va.stage_exit.default, (*trained, *rest))
    strided = h.detach().mT.contiguous().mT.requires_grad_()
    torch.library.opcheck(torch.ops.e3va.stage_exit.default, (strided, *trained[1:], *rest))
    p, mean, rstd = torch.randn(2, 3, 5, 4), torch.randn(30), torch.rand(30) + 1
    dmerged = torch.randn(2, 2, 3, 8) if merging else None
    norms = weight.detach(), bias.detach(), rest[1], *rest[3:]
    arguments = p.clone(), dmerged, p, mean, rstd, *norms
    torch.library.opcheck(torch.ops.e3va.stage_exit_backward.default, arguments)


def test_saves_what_the_neck_keeps_anyway():
    h, *rest = make_arguments((1, 4, 6, 8), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        p, _ = ops.stage_exit(h.requires_grad_(), *rest)
    maps = [t for t in saved if t.dim() == 4]
    assert len(maps) == 1 and maps[0].data_ptr() == p.data_ptr()
    assert not any(t.data_ptr() == h.data_ptr() for t in saved)


def test_a_weight_of_zero_gives_finite_gradients():
    h, weight, *rest = make_arguments((1, 4, 6, 8), torch.float32)
    weight[3] = 0
    p, merged = ops.stage_exit(h.requires_grad_(), weight.requires_grad_(), *rest)
    for gradient in torch.autograd.grad((p.sum() + merged.square().sum()), (h, weight)):
        assert gradient.isfinite().all()


def test_bad_input():
    h, weight, bias, eps, *merging, reduction = make_arguments((1, 2, 2, 4), torch.float32)
    with pytest.raises(ValueError, match="reduction must have shape"):
        ops.stage_exit(h, weight, bias, eps, *merging, reduction[:, :-1])
    with pytest.raises(ValueError, match="h must have shape"):
        ops.stage_exit(h[0], weight, bias, eps, *merging, reduction)
    with pytest.raises(ValueError, match="merge_weight, merge_bias and reduction together"):
        ops.stage_exit(h, weight, bias, eps, *merging)
    with pytest.raises(TypeError, match="weight must be of a floating dtype"):
        ops.stage_exit(h, weight.long(), bias, eps)


@pytest.mark.parametrize("tiny", [1e-4, 1e-39, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_channel_that_its_norm_hides_spoils_no_other(dtype, tiny):
    """Its values cannot be had back from p, but weigh next to nothing in the gradients."""
    h, weight, bias, *rest = make_arguments((2, 5, 7, 64), dtype)
    weight[3], bias[3] = tiny, 0.5
    exact = wide([h, weight, bias, *rest])
    trained = [value.requires_grad_() for value in exact[:3]]
    G = [torch.randn(out.shape).to(dtype) for out in oracle(*exact)]
    wanted = torch.autograd.grad(oracle(*exact), trained, [g.double() for g in G])
    ours = [value.detach().clone().requires_grad_() for value in (h, weight, bias)]
    found = torch.autograd.grad(ops.stage_exit(*ours, *rest), ours, G)
    others = torch.arange(64) != 3
    assert relative_error(found[0], wanted[0]) <= 3 * TOLERANCE[dtype] + 2e-2 * (tiny < 1e-30)
    assert relative_error(found[1][others], wanted[1][others]) <= 3 * TOLERANCE[dtype]
    assert all(value.isfinite().all() for value in found)
