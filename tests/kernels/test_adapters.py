"""The Triton kernels against float64 autograd through one adapter at a time."""

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from e3va.measure import LiveBytes
from e3va.ops.storage import compress
from tests import oracles
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are untested")
tl = pytest.importorskip("triton.language")
common = pytest.importorskip("e3va.kernels.common")

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS = [(0, "none"), (3, "none"), (0, "zero"), (3, "carry")]
"""(side of D, whether there is a state, and one from the stage before)."""
GRADIENTS = ("dbefore", "dD", "dg", "dQ", "db", "dU", "dg_up")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs one after the other, a large one as fast as a small one."""
    from e3va.kernels import adapters, adapters_backward

    def enlarged(tiles):
        def larger(*arguments):
            tile = tiles(*arguments)
            return tile._replace(rows=16 * tile.rows)

        return larger

    monkeypatch.setattr(common, "SPLITS", 3)
    if DEVICE == "cpu":
        for module, name in ((adapters, "forward_tiles"), (adapters_backward, "backward_tiles")):
            monkeypatch.setattr(module, name, enlarged(getattr(module, name)))


def make_arguments(shape, K, rank, hidden, dtype, side, state):
    """t, carry, D, gamma, g, Q, b, U, g_up: maps as ``dtype`` holds them, parameters in float32."""
    carry = torch.randn(*shape, rank).to(dtype) if state == "carry" else None
    D = torch.randn(K, rank, side, side) * 0.5 if side else None
    gamma = None if state == "none" else torch.randn(K, rank) * 0.5
    Q, U = torch.randn(K, rank, hidden) * rank**-0.5, torch.randn(K, hidden, rank) * hidden**-0.5
    branches = 2 - rank % 2
    d = rank // branches
    # Around the identity, where they begin: what nearly maps to zero loses digits.
    g, g_up = (torch.eye(d) + torch.randn(K, branches, d, d) * 0.3 * d**-0.5 for _ in range(2))
    t = torch.randn(K, *shape, rank).to(dtype)
    return t, carry, D, gamma, g, Q, torch.randn(K, hidden) * 0.5, U, g_up


def oracle(arguments, dS, dcarry):
    """S, u, and the gradients of (t, carry, D, gamma, g, Q, b, U, g_up);
    None where there is none."""
    inputs = [None if v is None else v.double().requires_grad_() for v in arguments]
    t, carry, D, gamma, *weights = inputs
    rank = t.shape[-1]
    identity = torch.eye(rank, dtype=torch.float64).expand(len(t), rank, rank)
    said, state = oracles.adapters(list(t), identity, *weights, D, gamma, carry)
    S = torch.cat(said, -1)
    outputs, gradients = [S], [dS.double().view_as(S)]
    u = []
    if gamma is not None:
        outputs, gradients = [S, state], [*gradients, dcarry.double().view_as(state)]
        heard = torch.zeros_like(t[0]) if carry is None else carry
        for k, s_k in enumerate(said):
            u.append(t[k] + gamma[k] * heard)
            heard = heard + s_k
        u.append(heard)
    given = [v for v in inputs if v is not None]
    found = iter(torch.autograd.grad(outputs, given, gradients))
    grads = [None if v is None else next(found) for v in inputs]
    return S.flatten(0, -2), torch.stack(u).flatten(1, -2) if u else None, grads


def check(
    shape,
    K,
    rank,
    hidden,
    dtype,
    side,
    state,
    kept="full",
    dstate=True,
    again=1,
    spoil=lambda v: v,
):
    """Kept in codes, u has those of what it is in full."""
    from e3va.kernels.adapters import adapters
    from e3va.kernels.adapters_backward import adapters_backward

    arguments = make_arguments(shape, K, rank, hidden, dtype, side, state)
    tokens = shape[0] * shape[1] * shape[2]
    dS = torch.randn(tokens, K * rank).to(dtype)
    dcarry = torch.randn(tokens, rank).to(dtype) * dstate
    S_exact, u_exact, exact = oracle(arguments, dS, dcarry)

    t, carry, *rest = (None if v is None else v.to(DEVICE) for v in arguments)
    t = spoil(t.flatten(1, -2))
    carry = None if carry is None else spoil(carry.flatten(0, -2))
    rest = [None if v is None else spoil(v) for v in rest]
    forward = t, carry, *rest, shape[1:], kept
    outputs = S, after, u, scale = adapters(*forward)
    assert scale.dtype == torch.float32
    assert S.dtype == dtype and S.shape == S_exact.shape
    assert relative_error(S.cpu(), S_exact) <= TOLERANCE[dtype]
    if u_exact is None:
        assert after.numel() == 0
    else:
        assert after.dtype == dtype and after.shape == u_exact[-1].shape
        assert relative_error(after.cpu(), u_exact[-1]) <= TOLERANCE[dtype]
    rounding = 0.0 if kept == "full" else 0.02
    if kept != "full":
        in_full = t if state == "none" else adapters(*forward[:-1])[2]
        codes, expected = compress(in_full.cpu(), kept, 0)
        assert u.dtype == torch.int8 and torch.equal(u.cpu(), codes.view(t.shape))
        assert torch.equal(scale.cpu(), expected.view(t.shape[:2]))
    elif state == "none":
        assert u.numel() == scale.numel() == 0
        u = t
    else:
        assert u.dtype == dtype and u.shape == t.shape
        assert relative_error(u.cpu(), u_exact[:-1]) <= TOLERANCE[dtype]

    after = spoil(dcarry.to(DEVICE)) if state != "none" and dstate else None
    scale = spoil(scale) if kept != "full" else None
    backward = spoil(dS.to(DEVICE)), after, spoil(u), scale, *rest, shape[1:]
    S_again, dt, *ours = results = adapters_backward(*backward)
    assert relative_error(S_again.cpu(), S_exact) <= TOLERANCE[dtype] + rounding
    assert dt.dtype == dtype and dt.shape == t.shape
    assert relative_error(dt.cpu(), exact[0].view(t.shape)) <= TOLERANCE[dtype] + rounding
    exact = [*exact[1:3], *exact[4:]]  # that of gamma is made elsewhere
    for name, grad, theirs in zip(GRADIENTS, ours, exact, strict=True):
        if name == "dbefore" and state != "none":
            assert grad.dtype == dtype and grad.shape == (tokens, rank)
            theirs = None if theirs is None else theirs.flatten(0, -2)
        elif theirs is None:
            assert grad.numel() == 0, name
        else:
            assert grad.dtype == torch.float32 and grad.shape == theirs.shape, name
        if theirs is not None:
            assert relative_error(grad.cpu(), theirs) <= TOLERANCE[dtype] + rounding, name
    for _ in range(again):
        repeated = *adapters(*forward), *adapters_backward(*backward)
        assert all(map(torch.equal, (*outputs, *results), repeated))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", UGLY_MAPS[1:], ids=str)
@pytest.mark.parametrize("side, state", FORMS)
def test_in_codes(shape, dtype, side, state):
    check(shape, 3, 6, 12, dtype, side, state, "int8", again=0)


@pytest.mark.parametrize("shape", UGLY_MAPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side, state", FORMS)
def test_any_map(shape, dtype, side, state):
    """Those of several images, too: no neighbour is of another one."""
    check(shape, 2, 5, 12, dtype, side, state, again=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", [5, 7])
def test_any_side(side, dtype):
    """Wider than the map, too."""
    check((2, 3, 4), 2, 4, 12, dtype, side, "zero", again=0)


@pytest.mark.parametrize("side, state", [(0, "none"), (3, "carry")])
@pytest.mark.parametrize(
    "K, rank, hidden, dtypes",
    [
        (1, 4, 24, (torch.float32, torch.bfloat16)),
        (3, 16, 96, (torch.bfloat16, torch.float32)),
        (2, 64, 128, (torch.float32, torch.bfloat16)),
        (2, 16, 320, (torch.bfloat16, torch.float32)),
    ],
)
def test_any_adapter(K, rank, hidden, side, state, dtypes):
    """``dtypes``: without neighbours, and with them."""
    dtype = dtypes[side > 0]
    check((2, 5, 9), K, rank, hidden, dtype, side, state, again=0)


def test_as_many_rows_as_on_a_gpu(monkeypatch):
    """Rows whose neighbours are another program's."""
    monkeypatch.undo()
    check((2, 5, 9), 2, 4, 12, torch.bfloat16, 3, "carry")


def test_many_adapters():
    check((3, 2, 3), 12, 4, 12, torch.float32, 3, "carry", again=0)


def test_nothing_asks_for_the_state():
    check((2, 3, 5), 2, 4, 12, torch.float32, 3, "carry", dstate=False)


@pytest.mark.parametrize("side, state", [(0, "none"), (3, "carry")])
def test_strided_input(side, state):
    check((1, 5, 9), 2, 5, 12, torch.float32, side, state, spoil=lambda v: v.mT.contiguous().mT)


def test_takes_parameters_of_the_rows_dtype():
    from e3va.kernels.adapters import adapters

    t, carry, *parameters = make_arguments((1, 3, 5), 2, 4, 12, torch.bfloat16, 3, "carry")
    rows = t.flatten(1, -2).to(DEVICE), carry.flatten(0, -2).to(DEVICE)
    exact = [v.bfloat16().float().to(DEVICE) for v in parameters]
    narrow = [v.bfloat16() for v in exact]
    ours, theirs = (adapters(*rows, *values, (3, 5)) for values in (narrow, exact))
    assert all(map(torch.equal, ours, theirs))


def test_launches_and_memory(monkeypatch):
    """Stage 3 of Swin-B at 800×1344, as on a GPU, but that no kernel runs."""
    from e3va.kernels import adapters, adapters_backward, fold

    monkeypatch.undo()
    launches = defaultdict(int)

    def pretend(name):
        def launch(*arguments, **constants):
            launches[name] += 1

        return defaultdict(lambda: launch)

    for module, name in (
        (adapters, "adapters"),
        (adapters_backward, "adapters_backward"),
        (fold, "fold"),
        (fold, "fold_backward"),
    ):
        monkeypatch.setattr(module, f"{name}_kernel", pretend(name))
    K, H, W, C, r, m = 36, 50, 84, 512, 16, 256
    shapes = (K, r, 3, 3), (K, r), (K, 2, 8, 8), (K, r, m), (K, m), (K, m, r), (K, 2, 8, 8)
    D, gamma, *weights = (torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes)
    t, tap, dS = (
        torch.zeros(shape, dtype=torch.bfloat16)
        for shape in ((K, H * W, r), (H * W, C), (H * W, K * r))
    )
    for kept in ("full", "int8"):
        launches.clear()
        with LiveBytes() as memory:
            u, scale = adapters.adapters(t, None, D, gamma, *weights, (H, W), kept)[2:]
            scale = None if kept == "full" else scale
            adapters_backward.adapters_backward(dS, None, u, scale, D, gamma, *weights, (H, W))
        assert memory.peak < K * tap.nbytes / 4
        assert launches == {
            "adapters": K,
            "adapters_backward": K + 1,
            "fold": 2,
            "fold_backward": 1,
        }
    launches.clear()
    adapters.adapters(t, None, None, None, *weights, (H, W))
    adapters_backward.adapters_backward(dS, None, t, None, None, None, *weights, (H, W))
    assert launches["adapters"] == 1 and launches["adapters_backward"] <= K / 4


@triton.jit
def gelu_kernel(z_ptr, alone_ptr, value_ptr, slope_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    z = tl.load(z_ptr + at)
    value, slope = common.gelu_and_slope(z)
    tl.store(alone_ptr + at, common.gelu(z))
    tl.store(value_ptr + at, value)
    tl.store(slope_ptr + at, slope)


def test_gelu():
    """All results within 1e-6 of float64, and no NaN far out."""
    z = torch.cat([torch.linspace(-12, 12, 2**14 - 4), torch.tensor([-1e30, -0.0, 0.0, 1e30])])
    exact = z.double().requires_grad_()
    expected = F.gelu(exact)
    (expected_slope,) = torch.autograd.grad(expected.sum(), exact)
    z = z.to(DEVICE)
    alone, value, slope = (torch.empty_like(z) for _ in range(3))
    gelu_kernel[(len(z) // 1024,)](z, alone, value, slope, SIZE=1024)
    for found in (alone, value):
        off = (found.cpu().double() - expected).abs()
        assert (off / exact.abs().clamp_min(1)).max() <= 1e-6 and off[:-4].max() <= 1e-6
    assert (slope.cpu().double() - expected_slope).abs().max() <= 1e-6
