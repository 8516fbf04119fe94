"""Taps in fewer bits: all backends agree to the last bit, and the gradient stays unbiased."""

from itertools import product

import pytest
import torch

import e3va
from e3va import ops
from e3va.ops import dispatch
from e3va.ops import storage as tap_storage
from e3va.ops.backends.registry import IMPLEMENTATIONS
from e3va.ops.sublayer_epilogue import TAPPED
from e3va.trunks.swin import SWIN_VARIANTS
from tests.ops.backends import backend_of
from tests.ops.test_highway import NAMES, make_parameters
from tests.ops.test_sublayer_epilogue import make_arguments
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error

COMPRESSED = ("fp8", "int8", "int4")
HIGHWAY_OPS = ("sublayer_epilogue", "adapters", "adapters_backward", "tap_gradient")
# Half a step of the grid at most: 4 bits of mantissa, the largest of a token over 127 or 7.
WORST = {"fp8": 2**-4, "int8": 0.5 / 127, "int4": 1 / 7}


@pytest.fixture(params=["reference", "native", pytest.param("triton", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the tensors of a test go, which runs on one backend; Triton's has an interpreter."""
    device = "cpu"
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is not installed: its kernels are untested")
        if torch.cuda.is_available():
            device = "cuda"
        else:
            for backends in (IMPLEMENTATIONS[op] for op in HIGHWAY_OPS):
                anywhere = backends["triton"]._replace(why_not=lambda device, dtype: None)
                monkeypatch.setitem(backends, "triton", anywhere)
    with e3va.backend(backend_of(request.param)):
        yield device


def store(x, storage, seed=0, norm=True):
    arguments = make_arguments((1, 1, 1), x.shape[-1], 4, x.dtype, norm)[2:]
    arguments = [a.to(x.device) if isinstance(a, torch.Tensor) else a for a in arguments]
    *_, kept, scale = ops.sublayer_epilogue(
        x, torch.zeros_like(x), *arguments, "output", storage, torch.tensor(seed)
    )
    return kept.cpu(), scale.cpu()


def check_bits(x, storage, device, seed=5, norm=True):
    """The op stores what the reference does."""
    expected = tap_storage.compress(x, storage, seed)
    actual = store(x.to(device), storage, seed, norm)
    tokens, channels = x.shape[:-1].numel(), x.shape[-1]
    assert actual[0].dtype == tap_storage.stored_dtype(storage)
    assert actual[0].shape == (tokens, tap_storage.stored_channels(channels, storage))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize(
    "shape, channels", [*product(UGLY_MAPS, [37]), *product(UGLY_MAPS[:2], [1, 24])], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", COMPRESSED)
def test_every_backend_stores_the_same_bits(shape, channels, dtype, storage, device):
    x = (torch.randn(*shape, channels) * torch.logspace(-6, 3, channels)).to(dtype)
    if x.numel():
        x[0, 0, 0] = 0  # a token of nothing
        # Its inverse would overflow; smaller ones Triton's interpreter reads wrongly from bfloat16.
        x[-1, -1, -1] = 1.2e-38
    check_bits(x, storage, device)


@pytest.mark.parametrize("channels", sorted({d for s in SWIN_VARIANTS.values() for d in s.dims}))
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("storage", COMPRESSED)
def test_widths_of_swin(channels, norm, storage, device):
    check_bits(torch.randn(1, 3, 7, channels).half(), storage, device, norm=norm)


@pytest.mark.parametrize("storage", COMPRESSED)
def test_non_contiguous_input(storage, device):
    x = torch.randn(2, 37, 5, 3).permute(0, 2, 3, 1)
    assert not x.is_contiguous()
    check_bits(x, storage, device)


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_ties_are_rounded_to_even(storage, device):
    """Every multiple of half a step that the grid has, around numbers with a code of their own."""
    top = tap_storage.LARGEST[storage]
    grid = torch.arange(-2 * 127, 2 * 127 + 1) / 2
    if storage == "fp8":
        codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        grid = torch.cat([codes, (codes[1:] + codes[:-1]) / 2])
        grid = torch.cat([grid, -grid, torch.nextafter(grid, torch.tensor(0.0))])
    x = torch.cat([grid, torch.tensor([top])])  # of scale 1
    check_bits(x.view(1, 1, 1, -1), storage, device)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**31 + 7, 2**32 + 5, -3])
def test_any_seed(seed, device):
    check_bits(torch.randn(1, 2, 3, 37), "int4", device, seed)


def test_an_index_is_added_to_the_seed(device):
    x = torch.randn(1, 2, 3, 37)
    arguments = *make_arguments((1, 1, 1), 37, 4, x.dtype)[2:], "output", "int4"
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    here = x.to(device), torch.zeros_like(x, device=device)
    seeds = (2**31 - 1, 7), (2**31 + 6, 0)
    one, two = (
        ops.sublayer_epilogue(*here, *arguments, torch.tensor(seed, device=device), index)[3]
        for seed, index in seeds
    )
    assert torch.equal(one, two)
    assert torch.equal(one.cpu(), tap_storage.compress(x, "int4", sum(seeds[0]))[0])


@pytest.mark.parametrize("storage", COMPRESSED)
def test_large_taps_are_stored_piece_by_piece(storage, monkeypatch):
    x = torch.randn(61, 37)
    whole = tap_storage.compress(x, storage, 5)
    expanded = tap_storage.expand(*whole, storage, 37, torch.float32)
    monkeypatch.setitem(tap_storage.CHUNK, "cpu", 300)
    for ours, theirs in zip(tap_storage.compress(x, storage, 5), whole, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(tap_storage.expand(*whole, storage, 37, torch.float32), expanded)


def test_random_words_are_uniform_beyond_32_bits():
    for place in (0, 2**31 - 5, 2**32 - 5, 2**33 + 7):
        words = tap_storage.random_words(100_000, 2**31 - 1, place, torch.device("cpu"))
        halves = torch.stack([words & 0xFFFF, (words >> 16) & 0xFFFF]) / 2**16
        assert halves.min() >= 0 and halves.max() < 1
        assert (halves.mean(1) - 0.5).abs().max() < 4 * (1 / 12) ** 0.5 / 100_000**0.5
        assert torch.corrcoef(halves)[0, 1].abs() < 4 / 100_000**0.5
    wrapped = tap_storage.random_words(10, 3, 2**32 - 5, torch.device("cpu"))
    assert torch.equal(wrapped[5:], tap_storage.random_words(5, 3, 0, torch.device("cpu")))


@pytest.mark.parametrize("storage", COMPRESSED)
def test_expanded_taps_are_close(storage, device):
    x = torch.randn(3, 5, 7, 33)
    expanded = tap_storage.expand(*store(x.to(device), storage), storage, 33, torch.float32)
    rows = x.flatten(0, 2)
    step = rows.abs() if storage == "fp8" else rows.abs().amax(1, keepdim=True)
    slack = rows.abs().amax(1, keepdim=True) * 2**-18  # subnormals of fp8
    assert ((expanded - rows).abs() <= step * WORST[storage] * (1 + 1e-5) + slack).all()


def test_int4_rounds_without_bias_and_repeats_from_its_seed():
    x = torch.linspace(-1, 1, 41).repeat(1, 1, 2000, 1)
    expanded = tap_storage.expand(*store(x, "int4", 3), "int4", 41, torch.float32)
    # 2000 roundings of a step of 1/7, whose deviation is at most half a step.
    error = expanded.mean(0) - x[0, 0, 0]
    assert error.abs().max() < 4.5 * (1 / 14) / 2000**0.5
    assert torch.equal(store(x, "int4", 3)[0], store(x, "int4", 3)[0])
    assert not torch.equal(store(x, "int4", 3)[0], store(x, "int4", 4)[0])


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("storage", COMPRESSED)
def test_a_norm_that_is_tapped_is_stored_like_any_map(storage, norm, device):
    """The bits of the norm as the op itself makes it, in the dtype of the map."""
    for dtype in (torch.float32, torch.bfloat16):
        arguments = make_arguments((1, 3, 7), 37, 5, dtype, norm)
        arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
        _, z, *_ = ops.sublayer_epilogue(*arguments, "norm")
        *_, kept, scale = ops.sublayer_epilogue(*arguments, "norm", storage, torch.tensor(5))
        expected = tap_storage.compress(z.cpu(), storage, 5)
        if device == "cuda" and not norm:  # one that is not stored may be another by its last bit
            ours, theirs = (
                tap_storage.expand(codes.cpu(), s.cpu(), storage, 37, torch.float32)
                for codes, s in ((kept, scale), expected)
            )
            assert relative_error(ours, theirs) < 0.02
            continue
        for ours, theirs in zip((kept.cpu(), scale.cpu()), expected, strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def gradients(tap, storage, x, G, parameters):
    P, *others = parameters.values()
    kept, room = [], tap_storage.room(x[0], P.shape[2], storage, len(x))
    with torch.no_grad():
        y = torch.zeros_like(G)
        for k, x_k in enumerate(x):
            into = [v[k] for v in room]
            y, z, *_ = ops.sublayer_epilogue(
                x_k, y, None, None, 1e-5, P[k], tap, storage, torch.tensor(k), 0, into
            )
            kept.append(x_k if tap == "output" else z)
    h = torch.zeros_like(G)
    t, codes, scale = room
    kept, scale = (kept, None) if storage == "full" else (codes, scale)
    out, _ = ops.highway(h, h, y, kept, t, P, *others, None, scale, storage)
    return dict(zip(NAMES, torch.autograd.grad(out, list(parameters.values()), G), strict=True))


@pytest.mark.parametrize("channels", [37, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tap", TAPPED)
@pytest.mark.parametrize(
    "storage, tolerance", [("full", 0.0), ("fp8", 0.04), ("int8", 0.015), ("int4", 0.25)]
)
def test_gradients(device, channels, dtype, tap, storage, tolerance):
    """Against float64. Only P's gradient sees the stored taps; all others are exact but for u,
    which int4 keeps in eight bits."""
    parameters = make_parameters(2, channels, 5, 12, torch.float32)
    x = [torch.randn(2, 3, 7, channels).to(dtype) for _ in range(2)]
    G = torch.randn(2, 3, 7, channels).to(dtype)
    there = {name: p.detach().to(device).requires_grad_() for name, p in parameters.items()}
    ours = gradients(tap, storage, [x_k.to(device) for x_k in x], G.to(device), there)
    wide = {name: p.detach().double().requires_grad_() for name, p in parameters.items()}
    # Triton's interpreter cuts bfloat16 off, which no GPU does.
    cut = device == "cpu" and dispatch.requested_backends() == ("triton",)
    rounding = TOLERANCE[dtype] * (2 if cut and dtype == torch.bfloat16 else 1)
    with e3va.backend("reference"):
        exact = gradients(tap, "full", [x_k.double() for x_k in x], G.double(), wide)
        same = gradients(tap, storage, [x_k.double() for x_k in x], G.double(), wide)
    # Where u lies between two codes of eight bits, its last bit decides which one it gets; so does
    # that of a norm for its code of four.
    tie = 4e-3 if storage == "int4" else 0.0
    if tap == "norm" and storage != "full":
        tie += 0.02 if dtype == torch.bfloat16 else 2e-3
    for name in NAMES:
        ours[name] = ours[name].cpu()
        assert relative_error(ours[name], same[name]) < rounding + tie, name
        # Of gamma's five numbers chance may cancel most: in 60 draws the error was 0.026 at most,
        # in half of them 0.006, as of the others.
        rounded_u = 0.03 if name == "gamma" else 0.015
        rounded_u = rounded_u if storage == "int4" and name not in "Pc" else 0.0
        allowed = rounding + (tolerance if name == "P" else rounded_u)
        assert relative_error(ours[name], exact[name]) < allowed, name
    if storage != "full":
        assert relative_error(ours["P"], exact["P"]) > 1e-4  # it was compressed indeed
