import pytest
import torch
import torch.nn.functional as F

import e3va
from e3va import ops
from tests.ops.backends import backend_of
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error


@pytest.fixture(autouse=True, params=["reference", "native"])
def backend(request):
    """The definition itself, and the compiled kernel, which leaves float64 to the definition."""
    with e3va.backend(backend_of(request.param)):
        yield


def make_arguments(shape, channels, rank, hidden, dtype, norm=True):
    x, y = (torch.randn(*shape, channels).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(channels), torch.randn(channels)) if norm else (None, None)
    P = torch.randn(channels, rank) * channels**-0.5
    Q = torch.randn(rank, hidden) * rank**-0.5
    U = torch.randn(hidden, rank) * hidden**-0.5
    return x, y, weight, bias, 1e-5, P, Q, torch.randn(hidden), U


def oracle(x, y, weight, bias, eps, P, Q, b, U):
    x, y, P, Q, b, U = (tensor.double() for tensor in (x, y, P, Q, b, U))
    z = y.new_empty(0)
    if weight is not None:
        z = F.layer_norm(y + x, y.shape[-1:], weight.double(), bias.double(), eps)
    t = x.flatten(0, -2) @ P
    return y + x, z, t, F.gelu(t @ Q + b) @ U


@pytest.mark.parametrize("shape", UGLY_MAPS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
def test_matches_float64(shape, dtype, norm):
    arguments = make_arguments(shape, 24, 5, 12, dtype, norm)
    if dtype == torch.float64:
        arguments = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
    with torch.no_grad():
        *results, tap, scale = ops.sublayer_epilogue(*arguments)
    assert tap.numel() == scale.numel() == 0
    for name, ours, theirs in zip(("y", "z", "t", "s"), results, oracle(*arguments), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert relative_error(ours, theirs) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_an_adapter(dtype):
    """The same sums and norms to the last bit, and no t and s."""
    arguments = make_arguments((2, 3, 7), 24, 5, 12, dtype)
    y, z, t, s, *_ = ops.sublayer_epilogue(*arguments[:5])
    for ours, theirs in zip((y, z), ops.sublayer_epilogue(*arguments)[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert t.numel() == s.numel() == 0


def test_opcheck():
    for norm in (True, False):
        arguments = (*make_arguments((2, 3, 5), 8, 4, 6, torch.float32, norm), "full", None)
        torch.library.opcheck(torch.ops.e3va.sublayer_epilogue.default, arguments)
        no_adapter = (*arguments[:5], None, None, None, None, "full", None)
        torch.library.opcheck(torch.ops.e3va.sublayer_epilogue.default, no_adapter)
        strided = (*(v.mT.contiguous().mT for v in arguments[:2]), *arguments[2:])
        torch.library.opcheck(torch.ops.e3va.sublayer_epilogue.default, strided)


def test_has_no_backward_and_says_so():
    x, *rest = make_arguments((1, 2, 2), 8, 4, 6, torch.float32)
    with pytest.raises(RuntimeError, match="no backward, but x requires a gradient"):
        ops.sublayer_epilogue(x.requires_grad_(), *rest)


@pytest.mark.parametrize(
    "index, spoil, error, message",
    [
        (1, lambda y: y.half(), TypeError, "y must have the dtype of x"),
        (1, lambda y: y[..., :-1], ValueError, "y must have shape"),
        (2, lambda w: w[:-1], ValueError, "norm_weight must have shape"),
        (3, lambda w: None, ValueError, "norm_weight and norm_bias together"),
        (5, lambda P: P[:-1], ValueError, "P must have shape"),
        (7, lambda b: b[:-1], ValueError, "b must have shape"),
        (7, lambda b: None, ValueError, "P, Q, b and U together"),
        (8, lambda U: U.long(), TypeError, "U must be of a floating dtype"),
    ],
)
def test_bad_input(index, spoil, error, message):
    arguments = list(make_arguments((1, 2, 2), 8, 4, 6, torch.float32))
    arguments[index] = spoil(arguments[index])
    with pytest.raises(error, match=message):
        ops.sublayer_epilogue(*arguments)
