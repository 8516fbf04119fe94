"""The Triton kernel against float64 autograd through a norm and a merging token by token."""

import pytest
import torch
import torch.nn.functional as F

from tests.ops.test_stage_exit import make_arguments, oracle, wide
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error

pytest.importorskip("triton", reason="triton is not installed: its kernels are untested")

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOTH = pytest.mark.parametrize("merging", [True, False], ids=["merging", "last"])


def check(shape, channels, dtype, merging, spoil=lambda v: v, change=lambda weight, bias: None):
    """All three gradients; those of a channel that its norm hides are not looked at."""
    from e3va.kernels.stage_exit import stage_exit_backward

    h, weight, bias, eps, *merge = make_arguments((*shape, channels), dtype, merging)
    change(weight, bias)
    told = weight.abs() > torch.finfo(dtype).eps * bias.abs() + torch.finfo(dtype).tiny
    exact = wide([h, weight, bias, eps, *merge])
    trained = [value.requires_grad_() for value in exact[:3]]
    outputs = oracle(*exact)[: 1 + merging]
    G = [torch.randn(out.shape).to(dtype) for out in outputs]
    expected = torch.autograd.grad(outputs, trained, [g.double() for g in G])

    p = outputs[0].detach().to(dtype)
    rows = exact[0].detach().flatten(0, -2)
    mean = rows.mean(1)
    statistics = mean, ((rows - mean[:, None]).square().mean(1) + eps).rsqrt()
    gathered = [None, None, 0.0]
    if merging:
        gathered = [(G[1].double() @ exact[7]).to(dtype), merge[0], merge[2]]
    tensors = [G[0], gathered[0], p, *(v.float() for v in statistics), weight, bias, gathered[1]]
    tensors = [None if v is None else spoil(v.detach().to(DEVICE)) for v in tensors]
    found = stage_exit_backward(*tensors, gathered[2])
    for name, ours, theirs in zip(("dh", "dweight", "dbias"), found, expected, strict=True):
        assert ours.dtype == (dtype if name == "dh" else torch.float32)
        assert ours.shape == theirs.shape and ours.isfinite().all(), name
        kept = told if name == "dweight" else slice(None)
        allowed = 3 * TOLERANCE[dtype] + 2e-2 * (not told.all())
        assert relative_error(ours.cpu()[..., kept], theirs[..., kept]) <= allowed, name
    again = stage_exit_backward(*tensors, gathered[2])
    assert all(map(torch.equal, found, again))


@BOTH
@pytest.mark.parametrize("shape", UGLY_MAPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_map(shape, dtype, merging):
    check(shape, 20, dtype, merging)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [3, 37, 96, 192, 1536])
def test_any_width(channels, dtype, merging):
    check((1, 5, 7), channels, dtype, merging)


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 4, 5), (1, 5, 4)], ids=str)
def test_even_sides(shape):
    check(shape, 24, torch.float32, True)


@BOTH
def test_strided_input(merging):
    def spoil(v):
        return torch.stack([v, v], -1)[..., 0] if v.dim() == 1 else v.mT.contiguous().mT

    check((2, 3, 5), 24, torch.float32, merging, spoil)


@pytest.mark.parametrize("tiny", [1e-4, 1e-39, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_channel_that_its_norm_hides_spoils_no_other(dtype, tiny):
    def change(weight, bias):
        weight[3], bias[3] = tiny, 0.5

    check((2, 5, 7), 64, dtype, True, change=change)


def test_a_large_mean_does_not_cancel():
    """Of a neighbourhood, whose deviation is far smaller."""
    from e3va.kernels.stage_exit import stage_exit_backward

    h = (torch.randn(1, 4, 6, 40, dtype=torch.float64) + 100).requires_grad_()
    weight, bias = torch.ones(40), torch.zeros(40)
    merge_weight, dgathered = torch.randn(160), torch.randn(1, 2, 3, 160)
    gathered = torch.cat([h[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
    gathered = F.layer_norm(gathered, (160,), merge_weight.double(), None, 1e-5)
    (expected,) = torch.autograd.grad(gathered, h, dgathered.double())
    h = h.detach()
    p = F.layer_norm(h, (40,), eps=1e-5).float()
    mean, rstd = h.mean(-1).flatten().float(), (h.var(-1, correction=0) + 1e-5).rsqrt().flatten()
    tensors = torch.zeros_like(p), dgathered, p, mean, rstd.float(), weight, bias, merge_weight
    dh, *_ = stage_exit_backward(*(v.to(DEVICE) for v in tensors), 1e-5)
    assert relative_error(dh.cpu(), expected) <= 1e-4
