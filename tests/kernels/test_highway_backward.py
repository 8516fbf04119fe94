"""The Triton kernels against float64 autograd through one adapter at a time."""

from collections import defaultdict

import pytest
import torch

from e3va.measure import LiveBytes
from e3va.ops.taps import LARGEST, compress, expand
from tests import oracles
from tests.ops.test_highway_backward import NAMES, make_parameters
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error

pytest.importorskip("triton", reason="triton is not installed: its kernels are untested")

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    """The interpreter runs one program after the other."""
    from e3va.kernels import highway_backward

    monkeypatch.setattr(highway_backward, "SPLITS", 5)


def check(shape, taps, channels, rank, hidden, dtype, spoil=lambda tensor: tensor):
    from e3va.kernels.highway_backward import highway_backward

    exact = make_parameters(taps, channels, rank, hidden)
    h, *x = (torch.randn(*shape, channels).to(dtype) for _ in range(taps + 1))
    G = torch.randn(*shape, channels).to(dtype)
    out = oracles.highway(h.double(), [x_k.double() for x_k in x], **exact)
    expected = torch.autograd.grad(out, list(exact.values()), G.double())

    P, Q, b, U, V, _ = (exact[name].detach().float().to(DEVICE) for name in NAMES)
    x = [spoil(x_k.flatten(0, -2).to(DEVICE)) for x_k in x]
    t = [spoil(x_k @ P_k.to(dtype)) for x_k, P_k in zip(x, P, strict=True)]
    arguments = (spoil(G.flatten(0, -2).to(DEVICE)), x, [], "full", t, P, Q, b, U, V)
    grads = highway_backward(*arguments)
    for name, ours, theirs in zip(NAMES, grads, expected, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == theirs.shape, name
        assert relative_error(ours, theirs) <= TOLERANCE[dtype], name
    for once, again in zip(grads, highway_backward(*arguments), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("shape", UGLY_MAPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_map(shape, dtype):
    check(shape, 2, 24, 5, 12, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "taps, channels, rank, hidden",
    [
        (1, 96, 4, 24),
        (3, 192, 16, 96),
        (4, 128, 64, 128),
        (2, 768, 16, 192),
        (1, 1536, 16, 768),
    ],
)
def test_any_adapter(taps, channels, rank, hidden, dtype):
    check((1, 5, 9), taps, channels, rank, hidden, dtype)


def test_many_taps():
    check((1, 1, 5), 36, 24, 4, 12, torch.bfloat16)


def test_makes_little_beside_the_taps(monkeypatch):
    """Stage 3 of Swin-B at 800×1344, as on a GPU, but that no kernel runs."""
    from e3va.kernels import highway_backward

    monkeypatch.undo()
    for kernel in ("rows_kernel", "weights_kernel"):
        grid = defaultdict(lambda: lambda *arguments, **constants: None)
        monkeypatch.setattr(highway_backward, kernel, grid)
    K, N, C, r, m = 36, 50 * 84, 512, 16, 256
    shapes = (N, r), (K, C, r), (K, r, m), (K, m), (K, m, r), (K, r, C)
    G, t, P, Q, b, U, V = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((N, C), *shapes))
    with LiveBytes() as memory:
        highway_backward.highway_backward(G, [G] * K, [], "full", [t] * K, P, Q, b, U, V)
    assert memory.peak < K * G.nbytes / 4


def test_strided_input():
    check((1, 5, 9), 2, 24, 5, 12, torch.float32, lambda tensor: tensor.t().contiguous().t())


@pytest.mark.parametrize("tokens", [0, 1, 300, 1000])
@pytest.mark.parametrize("channels, rank", [(1, 4), (37, 5), (96, 16), (192, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("taps", LARGEST)
def test_gradient_of_compressed_taps(tokens, channels, rank, dtype, taps):
    """Parts of several tiles, the last ones short or empty; dt as small as float16 just holds."""
    from e3va.kernels.highway_backward import tap_gradient

    codes, scale = compress(torch.randn(tokens, channels).to(dtype), taps, seed=5)
    dt = (torch.randn(tokens, rank) * 1e-3).to(dtype)
    expected = expand(codes, scale, taps, channels, torch.float64).t() @ dt.double()
    arguments = codes.to(DEVICE), scale.to(DEVICE), dt.to(DEVICE), taps, channels
    dP = tap_gradient(*arguments)
    assert dP.dtype == torch.float32 and dP.shape == (channels, rank)
    assert relative_error(dP.cpu(), expected) <= TOLERANCE[dtype]
    assert torch.equal(dP, tap_gradient(*arguments))
