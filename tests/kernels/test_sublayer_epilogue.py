"""The Triton kernel against float64: under Triton's interpreter, or on a GPU where there is one."""

import pytest
import torch

from e3va.ops.taps import LARGEST
from tests.ops.test_sublayer_epilogue import make_arguments, oracle
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error

pytest.importorskip("triton", reason="triton is not installed: its kernels are untested")

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(
    shape,
    channels,
    rank,
    hidden,
    dtype,
    norm,
    spoil=lambda tensor: tensor,
    tolerance=None,
    taps="full",
):
    from e3va.kernels.sublayer_epilogue import sublayer_epilogue

    arguments = [
        a.to(DEVICE) if isinstance(a, torch.Tensor) else a
        for a in make_arguments(shape, channels, rank, hidden, dtype, norm)
    ]
    arguments[0], arguments[1] = spoil(arguments[0]), spoil(arguments[1])
    *results, _, _ = sublayer_epilogue(*arguments, taps)
    for name, ours, theirs in zip(("y", "z", "t", "s"), results, oracle(*arguments), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape, name
        assert relative_error(ours, theirs) <= (tolerance or TOLERANCE[dtype]), name


@pytest.mark.parametrize("shape", UGLY_MAPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_map(shape, dtype):
    check(shape, 24, 5, 12, dtype, norm=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize(
    "channels, rank, hidden",
    [(96, 16, 48), (192, 16, 96), (128, 4, 32), (256, 64, 256), (768, 16, 192), (1536, 16, 768)],
)
def test_any_width(channels, rank, hidden, norm, dtype):
    check((1, 3, 7), channels, rank, hidden, dtype, norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [37, 192])
@pytest.mark.parametrize("taps", LARGEST)
def test_compressed_taps_leave_the_rest_alone(channels, dtype, taps):
    check((1, 3, 7), channels, 16, 48, dtype, norm=True, taps=taps)


def test_without_an_adapter():
    from e3va.kernels.sublayer_epilogue import sublayer_epilogue

    arguments = [
        a.to(DEVICE) if isinstance(a, torch.Tensor) else a
        for a in make_arguments((2, 3, 7), 24, 5, 12, torch.float32)
    ]
    y, z, t, s, codes, scale = sublayer_epilogue(*arguments[:5], taps="int4")
    for ours, theirs in zip((y, z), oracle(*arguments)[:2], strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float32]
    assert t.numel() == s.numel() == codes.numel() == scale.numel() == 0


def test_strided_input():
    def channels_first(x):
        return x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    check((2, 3, 5), 24, 4, 12, torch.float32, norm=True, spoil=channels_first)


def test_norm_of_a_large_mean_does_not_cancel():
    # y' itself is rounded to 600 · 2^-24, against a deviation of 1.4.
    check((1, 4, 5), 200, 4, 12, torch.float32, True, lambda x: x + 300, tolerance=1e-4)
