"""The Triton kernel against float64: under Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch
import torch.nn.functional as F

from e3va.ops.storage import LARGEST, compress, expand
from e3va.ops.sublayer_epilogue import TAPPED
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error

pytest.importorskip("triton", reason="triton is not installed: its kernels are untested")

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make_arguments(shape, channels, rank, dtype, norm=True, spoil=lambda tensor: tensor):
    x, y = (spoil(torch.randn(*shape, channels).to(dtype).to(DEVICE)) for _ in range(2))
    weight, bias, P = (torch.randn(n, channels, device=DEVICE) for n in (1, 1, rank))
    norm = (weight[0], bias[0]) if norm else (None, None)
    return x, y, *norm, 1e-5, P.t() * channels**-0.5


def oracle(x, y, weight, bias, eps, P, tap):
    x, y, P = (tensor.double() for tensor in (x, y, P))
    weight, bias = (None if v is None else v.double() for v in (weight, bias))
    z = F.layer_norm(y + x, y.shape[-1:], weight, bias, eps)
    return y + x, z, (x if tap == "output" else z).flatten(0, -2) @ P


def check(arguments, tap, storage="full", tolerance=None):
    from e3va.kernels.sublayer_epilogue import sublayer_epilogue

    x, _, weight, *_ = arguments
    seed, index = torch.tensor(3), 2
    y_out, z, t, codes, scale = sublayer_epilogue(*arguments, tap, storage, seed, index)
    stored = weight is not None or (tap == "norm" and storage == "full")
    assert stored or z.numel() == 0
    expected = oracle(*arguments, tap)
    for name, ours, theirs in zip(("y", "z", "t"), (y_out, z, t), expected, strict=True):
        if name == "z" and not stored:
            continue
        assert ours.dtype == x.dtype and ours.shape == theirs.shape, name
        assert relative_error(ours, theirs) <= (tolerance or TOLERANCE[x.dtype]), name
    if storage == "full":
        assert codes.numel() == scale.numel() == 0
        return
    if tap == "norm" and not stored:
        _, z, *_ = sublayer_epilogue(*arguments, tap, "full")
    expected = compress(x if tap == "output" else z, storage, 5)
    if tap == "norm" and not stored:  # of a norm that nobody reads the last bit is the kernel's
        rows = z.flatten(0, -2)
        error, least = (
            relative_error(expand(*kept, storage, z.shape[-1], torch.float64), rows)
            for kept in ((codes, scale), expected)
        )
        assert error <= 1.05 * least
        return
    for ours, theirs in zip((codes, scale), expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("shape", UGLY_MAPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tap", TAPPED)
def test_any_map(shape, dtype, tap):
    check(make_arguments(shape, 24, 5, dtype), tap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("tap", TAPPED)
@pytest.mark.parametrize(
    "channels, rank", [(1, 1), (96, 16), (192, 16), (128, 4), (256, 64), (768, 16), (1536, 16)]
)
def test_any_width(channels, rank, tap, norm, dtype):
    check(make_arguments((1, 3, 7), channels, rank, dtype, norm), tap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [37, 192])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("tap", TAPPED)
@pytest.mark.parametrize("storage", LARGEST)
def test_codes_are_those_of_the_tap_as_it_is_returned(storage, tap, norm, channels, dtype):
    check(make_arguments((2, 5, 9), channels, 16, dtype, norm), tap, storage)


@pytest.mark.parametrize("tap", TAPPED)
def test_without_an_adapter(tap):
    from e3va.kernels.sublayer_epilogue import sublayer_epilogue

    arguments = make_arguments((2, 3, 7), 24, 5, torch.float32)
    y, z, t, codes, scale = sublayer_epilogue(*arguments[:5], tap=tap, storage="int4")
    for ours, theirs in zip((y, z), oracle(*arguments, tap)[:2], strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]
    assert t.numel() == codes.numel() == scale.numel() == 0


@pytest.mark.parametrize("tap", TAPPED)
def test_strided_input(tap):
    def channels_first(x):
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    check(make_arguments((2, 3, 5), 24, 4, torch.float32, spoil=channels_first), tap)


@pytest.mark.parametrize("tap", TAPPED)
def test_norm_of_a_large_mean_does_not_cancel(tap):
    # y' itself is rounded to 600 · 2^-24, against a deviation of 1.4.
    arguments = make_arguments((1, 4, 5), 200, 4, torch.float32, spoil=lambda x: x + 300)
    check(arguments, tap, tolerance=1e-4)


@pytest.mark.parametrize("first", [0.0, 1.0, 1e3, 1e5])
def test_norm_of_a_first_slice_unlike_the_others(first):
    x, y, weight, bias, eps, P = make_arguments((1, 3, 7), 640, 4, torch.float32)
    y[..., :64] = first
    y[..., 0] *= -3
    check((x, y, weight, bias, eps, P), "norm")
