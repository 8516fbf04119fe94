import pytest
import torch

import e3va
from e3va import ops
from e3va.ops.taps import compress
from tests import oracles
from tests.ops.backends import backend_of
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error

NAMES = ("P", "Q", "b", "U", "V", "c")


@pytest.fixture(autouse=True, params=["reference", "native"])
def backend(request):
    """The definition itself, and the compiled kernel, which leaves float64 to the definition."""
    with e3va.backend(backend_of(request.param)):
        yield


def make_parameters(taps, channels, rank, hidden, dtype=torch.float64):
    shapes = {
        "P": (taps, channels, rank),
        "Q": (taps, rank, hidden),
        "b": (taps, hidden),
        "U": (taps, hidden, rank),
        "V": (taps, rank, channels),
        "c": (channels,),
    }
    scale = {"P": channels**-0.5, "Q": rank**-0.5, "U": hidden**-0.5, "V": rank**-0.5}
    return {
        name: (torch.randn(shape, dtype=torch.float64) * scale.get(name, 0.5))
        .to(dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def fused(h_in, y_in, x, parameters):
    """A stage as the backbone runs it: epilogue by epilogue, then the highway."""
    P, Q, b, U, V, c = (parameters[name] for name in NAMES)
    y, t, s = y_in, [], []
    with torch.no_grad():
        for k, x_k in enumerate(x):
            y, _, t_k, s_k, *_ = ops.sublayer_epilogue(
                x_k, y, None, None, 0.0, P[k], Q[k], b[k], U[k]
            )
            t.append(t_k)
            s.append(s_k)
    return ops.highway(h_in, y_in, y, x, t, s, P, Q, b, U, V, c)


@pytest.mark.parametrize("shape", UGLY_MAPS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "taps, channels, rank, hidden",
    [(1, 8, 4, 2), (4, 24, 16, 12), (6, 96, 5, 96), (2, 160, 40, 80)],
)
def test_matches_one_adapter_at_a_time(shape, dtype, taps, channels, rank, hidden):
    exact = make_parameters(taps, channels, rank, hidden)
    # The trunk's tensors as the dtype can hold them, so that only our own rounding is judged.
    h_in, y_in, *x = (
        torch.randn(*shape, channels, dtype=torch.float64).to(dtype) for _ in range(taps + 2)
    )
    G = torch.randn(*shape, channels, dtype=torch.float64).to(dtype)

    h_exact = h_in.double().requires_grad_()
    expected = oracles.highway(h_exact, [x_k.double() for x_k in x], **exact)
    expected_grads = torch.autograd.grad(expected, [h_exact, *exact.values()], G.double())

    # As in training, parameters stay in float32 or wider.
    wide = torch.promote_types(dtype, torch.float32)
    parameters = {k: v.detach().to(wide).requires_grad_() for k, v in exact.items()}
    h_fused = h_in.clone().requires_grad_()
    actual = fused(h_fused, y_in, x, parameters)
    actual_grads = torch.autograd.grad(actual, [h_fused, *parameters.values()], G)

    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= TOLERANCE[dtype]
    for name, ours, theirs in zip(("h", *NAMES), actual_grads, expected_grads, strict=True):
        assert ours.dtype == (dtype if name == "h" else wide)
        assert relative_error(ours, theirs) <= TOLERANCE[dtype], name


def test_every_run_gives_the_same_bits():
    """2079 tokens: several chunks, the last one short."""
    parameters = make_parameters(2, 24, 5, 12, torch.float32)
    h, *x = (torch.randn(3, 21, 33, 24) for _ in range(3))
    G = torch.randn(3, 21, 33, 24)

    def run():
        return torch.autograd.grad(fused(h, h, x, parameters), list(parameters.values()), G)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


def test_gradcheck_in_float64():
    parameters = make_parameters(3, 8, 4, 6)
    y_in, *x = (torch.randn(2, 2, 3, 8, dtype=torch.float64) for _ in range(4))
    h_in = torch.randn(2, 2, 3, 8, dtype=torch.float64, requires_grad=True)

    def stage(h_in, *values):
        return fused(h_in, y_in, x, dict(zip(NAMES, values, strict=True)))

    assert torch.autograd.gradcheck(stage, (h_in, *parameters.values()))


def test_non_contiguous_input():
    parameters = make_parameters(2, 8, 4, 6)
    tensors = [torch.randn(2, 8, 5, 3, dtype=torch.float64) for _ in range(4)]
    strided = [tensor.permute(0, 2, 3, 1) for tensor in tensors]
    assert not strided[0].is_contiguous()
    G = torch.randn(2, 8, 5, 3, dtype=torch.float64).permute(0, 2, 3, 1)

    def run(h_in, y_in, *x):
        out = fused(h_in, y_in, x, parameters)
        return out, *torch.autograd.grad(out, list(parameters.values()), G)

    for ours, theirs in zip(run(*strided), run(*(s.contiguous() for s in strided)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_exact_trunk_at_initialisation():
    """With V = 0, c = 0 and h_in = y_in the highway is the trunk's output to the last bit."""
    for dtype in TOLERANCE:
        parameters = make_parameters(2, 8, 4, 6, torch.promote_types(dtype, torch.float32))
        with torch.no_grad():
            parameters["V"].zero_()
            parameters["c"].zero_()
        y, *x = (torch.randn(1, 5, 7, 8).to(dtype) for _ in range(3))
        expected = (y + x[0]) + x[1]
        assert torch.equal(fused(y, y, x, parameters), expected)


def test_saves_only_taps_t_and_parameters():
    parameters = make_parameters(3, 16, 4, 8, torch.float32)
    h_in, y_in, *x = (torch.randn(1, 4, 5, 16, requires_grad=i == 0) for i in range(5))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(h_in, y_in, x, parameters)
    shapes = sorted(tuple(t.shape) for t in saved)
    expected = [(1, 4, 5, 16)] * 3 + [(20, 4)] * 3
    expected += [tuple(parameters[n].shape) for n in ("P", "Q", "b", "U", "V")]
    assert shapes == sorted(expected)


def opcheck_arguments():
    parameters = make_parameters(2, 8, 4, 6, torch.float32)
    h_in, y_in, y_out, *x = (torch.randn(2, 3, 2, 8) for _ in range(5))
    t = [torch.randn(12, 4) for _ in x]
    return h_in.requires_grad_(), y_in, y_out, x, t, [t_k.clone() for t_k in t], parameters


def test_opcheck():
    h_in, y_in, y_out, x, t, s, parameters = opcheck_arguments()
    args = (h_in, y_in, y_out, "full", x, [], t, s, *parameters.values())
    torch.library.opcheck(torch.ops.e3va.highway.default, args)
    G, values = torch.randn_like(y_in), [p.detach() for p in parameters.values()]
    torch.library.opcheck(
        torch.ops.e3va.highway_backward.default, (G, "full", x, [], t, *values[:5])
    )


def test_opcheck_of_channels_first():
    """One image, whose tokens then are a view of it."""
    _, _, _, x, t, s, parameters = opcheck_arguments()
    maps = [torch.randn(1, 8, 3, 4).permute(0, 2, 3, 1) for _ in range(3)]
    args = (*maps, "full", x, [], t, s, *parameters.values())
    torch.library.opcheck(torch.ops.e3va.highway.default, args)


def test_opcheck_of_int4():
    h_in, y_in, y_out, x, t, s, parameters = opcheck_arguments()
    codes, scale = zip(*(compress(x_k, "int4", seed=1) for x_k in x), strict=True)
    args = (h_in, y_in, y_out, "int4", codes, scale, t, s, *parameters.values())
    torch.library.opcheck(torch.ops.e3va.highway.default, args)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=lambda v: v[:1]), ValueError, "2 adapters, got 1 x"),
        (dict(h_in=lambda v: v[:, :1]), ValueError, "h_in must have shape"),
        (dict(y_in=lambda v: v.double()), TypeError, "y_in must have the dtype of y_out"),
        (dict(c=lambda v: v[:-1]), ValueError, "c must have shape"),
        (dict(Q=lambda v: v.half()), TypeError, "Q must have the dtype of P"),
        (dict(P=lambda v: v[0]), ValueError, r"P must have shape \[any, any, any\]"),
        (dict(t=lambda v: [v[0], v[1][:-1]]), ValueError, r"t\[1\] must have shape"),
        (dict(V=lambda v: v.long()), TypeError, "V must be of a floating dtype"),
        (dict(taps=lambda _: "int2"), ValueError, "taps must be one of full, fp8, int8, int4"),
        (dict(taps=lambda _: "int8"), ValueError, "2 taps 'int8' do not go with 0 scales"),
        (dict(scale=lambda _: [torch.ones(12)]), ValueError, "2 taps 'full' do not go with 1"),
    ],
)
def test_bad_input(change, error, message):
    h_in, y_in, y_out, x, t, s, parameters = opcheck_arguments()
    arguments = dict(h_in=h_in, y_in=y_in, y_out=y_out, x=x, t=t, s=s, **parameters)
    arguments |= dict(taps="full", scale=[])
    for name, spoil in change.items():
        arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=message):
        ops.highway(**arguments)
