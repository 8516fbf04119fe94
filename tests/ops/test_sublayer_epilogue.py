import pytest
import torch
import torch.nn.functional as F

import e3va
from e3va import ops
from e3va.ops.storage import compress, room
from e3va.ops.sublayer_epilogue import TAPPED
from tests.ops.backends import backend_of
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error


@pytest.fixture(autouse=True, params=["reference", "native"])
def backend(request):
    """The definition itself, and the compiled kernel, which leaves float64 to the definition."""
    with e3va.backend(backend_of(request.param)):
        yield


def make_arguments(shape, channels, rank, dtype, norm=True):
    x, y = (torch.randn(*shape, channels).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(channels), torch.randn(channels)) if norm else (None, None)
    return x, y, weight, bias, 1e-5, torch.randn(channels, rank) * channels**-0.5


def oracle(x, y, weight, bias, eps, P, tap="output"):
    """y', the norm and t in float64; the norm without weight and bias where there is none."""
    x, y, P = (tensor.double() for tensor in (x, y, P))
    weight, bias = (None if v is None else v.double() for v in (weight, bias))
    z = F.layer_norm(y + x, y.shape[-1:], weight, bias, eps)
    return y + x, z, (x if tap == "output" else z).flatten(0, -2) @ P


@pytest.mark.parametrize("shape", UGLY_MAPS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("tap", TAPPED)
def test_matches_float64(shape, dtype, norm, tap):
    for channels, rank in ((24, 5), (37, 16)):
        arguments = make_arguments(shape, channels, rank, dtype, norm)
        if dtype == torch.float64:
            arguments = [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]
        with torch.no_grad():
            *results, kept, scale = ops.sublayer_epilogue(*arguments, tap)
        assert kept.numel() == scale.numel() == 0
        expected = oracle(*arguments, tap)
        if not norm and tap == "output":
            assert results[1].numel() == 0
            results, expected = results[::2], expected[::2]
        for ours, theirs in zip(results, expected, strict=True):
            assert ours.dtype == dtype and ours.shape == theirs.shape
            assert relative_error(ours, theirs) <= TOLERANCE[dtype]


@pytest.mark.parametrize("storage", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
def test_a_norm_that_is_tapped_is_kept_alone(storage, norm):
    """After a stage's last sub-layer nobody reads the norm but the adapter."""
    arguments = make_arguments((2, 3, 7), 24, 5, torch.float32, norm)
    _, z, t, kept, scale = ops.sublayer_epilogue(*arguments, "norm", storage)
    assert z.numel() == (42 * 24 if norm else 0) and len(kept) == len(scale) == 42
    _, full, t_full, *_ = ops.sublayer_epilogue(*arguments, "norm")
    assert torch.equal(t, t_full)
    for ours, theirs in zip((kept, scale), compress(full, storage, 0), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tap", TAPPED)
def test_without_an_adapter(dtype, tap):
    """The same sums and norms to the last bit, and no t."""
    arguments = make_arguments((2, 3, 7), 24, 5, dtype)
    y, z, t, *_ = ops.sublayer_epilogue(*arguments[:5], tap=tap)
    for ours, theirs in zip((y, z), ops.sublayer_epilogue(*arguments, tap)[:2], strict=True):
        assert torch.equal(ours, theirs)
    assert t.numel() == 0


@pytest.mark.parametrize("tap", TAPPED)
@pytest.mark.parametrize("storage", ["full", "int4"])
def test_opcheck(tap, storage):
    for norm in (True, False):
        x, y, *rest = make_arguments((2, 3, 5), 8, 4, torch.float32, norm)
        rest += [tap, storage, None, 0, list(room(x, 4, storage))]
        arguments = x, y, *rest
        torch.library.opcheck(torch.ops.e3va.sublayer_epilogue.default, arguments)
        no_adapter = (*arguments[:5], None, tap, storage, None, 0, [])
        torch.library.opcheck(torch.ops.e3va.sublayer_epilogue.default, no_adapter)
        strided = (*(v.mT.contiguous().mT for v in arguments[:2]), *arguments[2:])
        torch.library.opcheck(torch.ops.e3va.sublayer_epilogue.default, strided)


def test_has_no_backward_and_says_so():
    x, *rest = make_arguments((1, 2, 2), 8, 4, torch.float32)
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
        (5, lambda P: P.long(), TypeError, "P must be of a floating dtype"),
        (6, lambda _: "input", ValueError, "tap must be one of output, norm, got 'input'"),
        (7, lambda _: "int2", ValueError, "storage must be one of full, fp8, int8, int4"),
    ],
)
def test_bad_input(index, spoil, error, message):
    arguments = [*make_arguments((1, 2, 2), 8, 4, torch.float32), "output", "full"]
    arguments[index] = spoil(arguments[index])
    with pytest.raises(error, match=message):
        ops.sublayer_epilogue(*arguments)


def smaller(part):
    return lambda into: [v[1:] if i == part else v for i, v in enumerate(into)]


@pytest.mark.parametrize(
    "spoil, error, message",
    [
        (smaller(0), ValueError, r"into\[0\] must have shape \[6, 4\], got \[5, 4\]"),
        (smaller(1), ValueError, r"into\[1\] must have shape"),
        (smaller(2), ValueError, r"into\[2\] must have shape \[6\], got \[5\]"),
        (lambda into: [into[0].double(), *into[1:]], TypeError, "dtype of x"),
        (
            lambda into: [into[0], into[1].to(torch.int16), into[2]],
            TypeError,
            "does not hold a tap as",
        ),
        (lambda into: [into[0], into[1], into[2].half()], TypeError, "does not hold a tap as"),
        (lambda into: [into[0].mT.contiguous().mT, *into[1:]], ValueError, "must be contiguous"),
    ],
)
@pytest.mark.parametrize("storage", ["int4", "fp8"])
def test_results_are_not_written_where_they_do_not_fit(storage, spoil, error, message):
    x, *rest = make_arguments((2, 3), 10, 4, torch.float32)
    into = spoil(list(room(x, 4, storage)))
    with torch.no_grad(), pytest.raises(error, match=message):
        ops.sublayer_epilogue(x, *rest, "norm", storage, into=into)
