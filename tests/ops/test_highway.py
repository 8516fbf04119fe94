from itertools import product

import pytest
import torch
import torch.nn.functional as F

import e3va
from e3va import ops
from e3va.highway import HEARD
from e3va.ops.functional import pool_2x2
from e3va.ops.storage import compress
from tests import oracles
from tests.ops.backends import backend_of
from tests.oracles import TOLERANCE, UGLY_MAPS, relative_error

NAMES = ("P", "g", "Q", "b", "U", "g_up", "V", "c", "D", "gamma")
FORMS = [(0, False), (3, False), (0, True), (3, True), (7, True)]
"""(side of D, whether there is a state): both none in the published highway."""


@pytest.fixture(autouse=True, params=["reference", "native"])
def backend(request):
    """The definition itself, and the compiled kernel, which leaves float64 to the definition."""
    with e3va.backend(backend_of(request.param)):
        yield


def make_parameters(adapters, channels, rank, hidden, dtype=torch.float64, side=3, state=True):
    branches = 2 - rank % 2
    kernel = adapters, branches, rank // branches, rank // branches
    shapes = {
        "P": (adapters, channels, rank),
        "g": kernel,
        "Q": (adapters, rank, hidden),
        "b": (adapters, hidden),
        "U": (adapters, hidden, rank),
        "g_up": kernel,
        "V": (adapters, rank, channels),
        "c": (channels,),
    }
    shapes |= {"D": (adapters, rank, side, side)} if side else {}
    shapes |= {"gamma": (adapters, rank)} if state else {}
    scale = {"P": channels**-0.5, "Q": rank**-0.5, "U": hidden**-0.5, "V": rank**-0.5}
    scale |= dict.fromkeys(("g", "g_up"), 0.3 * kernel[-1] ** -0.5)
    # Around the identity, where they begin: what nearly maps to zero loses digits.
    begin = dict.fromkeys(("g", "g_up"), torch.eye(kernel[-1], dtype=torch.float64))
    return {
        name: (torch.randn(shape, dtype=torch.float64) * scale.get(name, 0.5) + begin.get(name, 0))
        .to(dtype)
        .requires_grad_()
        for name, shape in shapes.items()
    }


def fused(h_in, y_in, x, parameters, carry=None):
    """A stage as the backbone runs it: epilogue by epilogue, then the highway. Without a state the
    second result is zero."""
    parameters = dict(parameters)
    P = parameters.pop("P")
    y, t = y_in, []
    with torch.no_grad():
        for k, x_k in enumerate(x):
            y, _, t_k, *_ = ops.sublayer_epilogue(x_k, y, None, None, 0.0, P[k])
            t.append(t_k)
    h, state = ops.highway(h_in, y_in, y, x, torch.stack(t), P, **parameters, carry=carry)
    return h, h.new_zeros(*h.shape[:-1], P.shape[-1]) if state is None else state


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape, form, sizes",
    [
        *product(UGLY_MAPS, FORMS, [(4, 24, 16, 12)]),
        *product(UGLY_MAPS[:2], FORMS[::3], [(1, 8, 4, 2), (3, 96, 5, 96), (2, 160, 40, 80)]),
    ],
    ids=str,
)
def test_matches_one_adapter_at_a_time(dtype, shape, form, sizes):
    (side, state), (adapters, channels, rank, hidden) = form, sizes
    exact = make_parameters(adapters, channels, rank, hidden, side=side, state=state)
    # The trunk's tensors as the dtype can hold them, so that only our own rounding is judged.
    h_in, y_in, *x = (
        torch.randn(*shape, channels, dtype=torch.float64).to(dtype) for _ in range(adapters + 2)
    )
    G = torch.randn(*shape, channels, dtype=torch.float64).to(dtype)
    dstate, carry = (torch.randn(*shape, rank, dtype=torch.float64).to(dtype) for _ in range(2))

    def run(stage, parameters, cast):
        inputs = [cast(h_in).requires_grad_()]
        inputs += [cast(carry).requires_grad_()] if state else []
        out = stage(inputs[0], [cast(x_k) for x_k in x], parameters, *inputs[1:])
        results, gradients = (out, (G, dstate)) if state else (out[:1], (G,))
        inputs += parameters.values()
        return results, torch.autograd.grad(results, inputs, [cast(g) for g in gradients])

    expected, expected_grads = run(
        lambda h, x, p, carry=None: oracles.highway(h, x, **p, carry=carry),
        exact,
        torch.Tensor.double,
    )
    # As in training, parameters stay in float32 or wider.
    wide = torch.promote_types(dtype, torch.float32)
    parameters = {k: v.detach().to(wide).requires_grad_() for k, v in exact.items()}
    actual, actual_grads = run(
        lambda h, x, p, carry=None: fused(h, y_in, x, p, carry), parameters, torch.clone
    )
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, theirs) <= TOLERANCE[dtype]
    names = ["h", "carry"] if state else ["h"]
    for name, ours, theirs in zip([*names, *exact], actual_grads, expected_grads, strict=True):
        assert ours.dtype == (dtype if name in names else wide)
        assert relative_error(ours, theirs) <= TOLERANCE[dtype], name


def test_first_stage_has_no_state_to_hear():
    """Without a carry the first gamma has no gradient, in whatever precision the state is kept."""
    for dtype in TOLERANCE:
        parameters = make_parameters(2, 8, 4, 6, torch.promote_types(dtype, torch.float32))
        h, *x = (torch.randn(2, 3, 5, 8).to(dtype) for _ in range(3))
        out, state = fused(h, h, x, parameters)
        (dgamma,) = torch.autograd.grad(out.sum() + state.sum(), parameters["gamma"])
        assert not dgamma[0].any() and dgamma[1].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deep_stages_with_taps_in_four_bits(dtype):
    """36 adapters that hear each other: the gradients of what they hear, too, are as exact as u is
    in eight bits."""
    K, C, r, m = 36, 24, 8, 12
    exact = make_parameters(K, C, r, m)
    with torch.no_grad():
        exact["gamma"].fill_(HEARD / K)
        for name in ("D", "b"):
            exact[name] *= 0.1
    h, *x = (torch.randn(2, 5, 7, C, dtype=torch.float64).to(dtype) for _ in range(K + 1))
    G = torch.randn(2, 5, 7, C, dtype=torch.float64).to(dtype)
    out, _ = oracles.highway(h.double(), [x_k.double() for x_k in x], **exact)
    expected = torch.autograd.grad(out, list(exact.values()), G.double())

    parameters = {k: v.detach().float().requires_grad_() for k, v in exact.items()}
    P, *others = parameters.values()
    with torch.no_grad():
        y, t, codes, scales = h, [], [], []
        for k, x_k in enumerate(x):
            y, _, t_k, code, scale = ops.sublayer_epilogue(
                x_k, y, None, None, 0.0, P[k], "output", "int4", torch.tensor(k)
            )
            t, codes, scales = [*t, t_k], [*codes, code], [*scales, scale]
    t, codes, scales = (torch.stack(v) for v in (t, codes, scales))
    out, _ = ops.highway(h, h, y, codes, t, P, *others, None, scales, "int4")
    found = torch.autograd.grad(out, list(parameters.values()), G)
    for name, ours, theirs in zip(parameters, found, expected, strict=True):
        if name != "P":  # whose taps have four bits
            assert relative_error(ours, theirs) < (0.03 if dtype == torch.float32 else 0.1), name


def test_sums_of_scaled_gradients_do_not_overflow():
    """float16 under loss scaling: parameters' gradients are sums beyond 65504."""
    exact = make_parameters(2, 24, 5, 12)
    h, *x = (torch.randn(1, 31, 33, 24, dtype=torch.float64).half() for _ in range(3))
    G = torch.full_like(h, 2000.0)
    out, _ = oracles.highway(h.double(), [x_k.double() for x_k in x], **exact)
    expected = torch.autograd.grad(out, list(exact.values()), G.double())
    assert max(gradient.abs().max() for gradient in expected) > 1e6
    parameters = {k: v.detach().float().requires_grad_() for k, v in exact.items()}
    out, _ = fused(h, h, x, parameters)
    for name, ours, theirs in zip(
        parameters, torch.autograd.grad(out, list(parameters.values()), G), expected, strict=True
    ):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float16], name


def test_images_do_not_see_each_other():
    parameters = make_parameters(2, 8, 4, 6, torch.float32, side=7)
    h, *x = (torch.randn(3, 4, 3, 8) for _ in range(3))
    together = fused(h, h, x, parameters)
    for i in range(3):
        alone = fused(h[i : i + 1], h[i : i + 1], [x_k[i : i + 1] for x_k in x], parameters)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i : i + 1], theirs)


def test_every_run_gives_the_same_bits():
    """2079 tokens: several chunks, the last one short."""
    parameters = make_parameters(2, 24, 5, 12, torch.float32)
    h, *x = (torch.randn(3, 21, 33, 24) for _ in range(3))
    G = torch.randn(3, 21, 33, 24)

    def run():
        out, _ = fused(h, h, x, parameters)
        return torch.autograd.grad(out, list(parameters.values()), G)

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("backend", ["reference"], indirect=True)  # no other knows float64
@pytest.mark.parametrize("side, state", FORMS)
def test_gradcheck_in_float64(side, state):
    parameters = make_parameters(2, 4, 3, 4, side=side, state=state)
    y_in, *x = (torch.randn(2, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    h_in = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    carry = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def stage(h_in, carry, *values):
        named = dict(zip(parameters, values, strict=True))
        return fused(h_in, y_in, x, named, carry if state else None)

    assert torch.autograd.gradcheck(stage, (h_in, carry, *parameters.values()))


def test_non_contiguous_input():
    parameters = make_parameters(2, 8, 4, 6)
    tensors = [torch.randn(2, 8, 5, 3, dtype=torch.float64) for _ in range(4)]
    tensors.append(torch.randn(2, 4, 5, 3, dtype=torch.float64))
    strided = [tensor.permute(0, 2, 3, 1) for tensor in tensors]
    assert not strided[0].is_contiguous()
    G = torch.randn(2, 8, 5, 3, dtype=torch.float64).permute(0, 2, 3, 1)

    def run(h_in, y_in, x_0, x_1, carry):
        out = fused(h_in, y_in, [x_0, x_1], parameters, carry)
        return *out, *torch.autograd.grad(out[0], list(parameters.values()), G)

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
        assert torch.equal(fused(y, y, x, parameters)[0], expected)


@pytest.mark.parametrize("side, state", FORMS)
def test_saves_only_taps_u_and_parameters(side, state):
    parameters = make_parameters(3, 16, 4, 8, torch.float32, side, state)
    h_in, y_in, *x = (torch.randn(1, 4, 5, 16, requires_grad=i == 0) for i in range(5))
    carry = torch.randn(1, 4, 5, 4) if state else None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(h_in, y_in, x, parameters, carry)
    shapes = sorted(tuple(t.shape) for t in saved if t.numel())
    expected = [(1, 4, 5, 16)] * 3 + [(3, 20, 4)] + [(1, 4, 5, 4)] * state
    expected += [tuple(p.shape) for name, p in parameters.items() if name != "c"]
    assert shapes == sorted(expected)


def opcheck_arguments():
    parameters = make_parameters(2, 8, 4, 6, torch.float32)
    h_in, y_in, y_out, *x = (torch.randn(2, 3, 2, 8) for _ in range(5))
    t = torch.randn(2, 12, 4)
    carry = torch.randn(2, 3, 2, 4, requires_grad=True)
    return h_in.requires_grad_(), y_in, y_out, carry, x, t, parameters


ORDER = ("P", "D", "gamma", "g", "Q", "b", "U", "g_up", "V", "c")


@pytest.mark.parametrize("published", [False, True], ids=["e3va", "published"])
def test_opcheck(published):
    h_in, y_in, y_out, carry, x, t, parameters = opcheck_arguments()
    kept = torch.randn(2, 12, 4)
    dcarry = torch.randn(2, 3, 2, 4)
    if published:
        parameters |= {"D": None, "gamma": None}
        carry, dcarry = None, None
    values = [parameters[name] for name in ORDER]
    args = (h_in, y_in, y_out, carry, "full", x, None, t, *values)
    torch.library.opcheck(torch.ops.e3va.highway.default, args)
    values = [None if p is None else p.detach() for p in values]
    carry = None if carry is None else carry.detach()
    args = (
        torch.randn_like(y_in),
        carry,
        dcarry,
        "full",
        x,
        None,
        kept,
        torch.empty(0),
        *values[:-1],
    )
    torch.library.opcheck(torch.ops.e3va.highway_backward.default, args)


def test_opcheck_of_channels_first():
    """One image, whose tokens then are a view of it."""
    _, _, _, _, x, t, parameters = opcheck_arguments()
    maps = [torch.randn(1, 8, 3, 4).permute(0, 2, 3, 1) for _ in range(3)]
    x = [x_k.view(1, 3, 4, 8) for x_k in x]
    values = [parameters[name] for name in ORDER]
    args = (*maps, None, "full", x, None, t, *values)
    torch.library.opcheck(torch.ops.e3va.highway.default, args)


def test_opcheck_of_int4():
    h_in, y_in, y_out, carry, x, t, parameters = opcheck_arguments()
    codes, scale = map(torch.stack, zip(*(compress(x_k, "int4", seed=1) for x_k in x), strict=True))
    values = [parameters[name] for name in ORDER]
    args = (h_in, y_in, y_out, carry, "int4", [codes], scale, t, *values)
    torch.library.opcheck(torch.ops.e3va.highway.default, args)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(taps=lambda v: v[:1]), ValueError, "2 adapters, got 1 taps"),
        (dict(h_in=lambda v: v[:, :1]), ValueError, "h_in must have shape"),
        (dict(y_in=lambda v: v.double()), TypeError, "y_in must have the dtype of y_out"),
        (dict(c=lambda v: v[:-1]), ValueError, "c must have shape"),
        (dict(Q=lambda v: v.half()), TypeError, "Q must have the dtype of P"),
        (dict(g=lambda v: v[:, 1:]), ValueError, "g must have 4 rows in all .* got 1 kernels of 2"),
        (dict(g_up=lambda v: v[..., 1:]), ValueError, r"g_up must have shape \[2, 2, 2, 2\]"),
        (dict(P=lambda v: v[0]), ValueError, r"P must have shape \[any, any, any\]"),
        (dict(t=lambda v: v[:, :-1]), ValueError, r"t must have shape \[2, 12, 4\]"),
        (dict(V=lambda v: v.long()), TypeError, "V must be of a floating dtype"),
        (dict(D=lambda v: v[:, :, 1:]), ValueError, r"D must have shape \[2, 4, 3, 3\]"),
        (dict(D=lambda v: v[:, :, 1:, 1:]), ValueError, "D must have an odd side, got 2"),
        (dict(gamma=lambda v: v[:, 1:]), ValueError, r"gamma must have shape \[2, 4\]"),
        (dict(gamma=lambda v: None), ValueError, "a carry is heard through gamma"),
        (dict(carry=lambda v: v[:, 1:]), ValueError, "carry must have shape"),
        (dict(carry=lambda v: v.half()), TypeError, "carry must have the dtype of y_out"),
        (
            dict(storage=lambda _: "int2"),
            ValueError,
            "storage must be one of full, fp8, int8, int4",
        ),
        (dict(storage=lambda _: "int8"), ValueError, "taps kept as 'int8' come without a scale"),
        (
            dict(scale=lambda _: torch.ones(2, 12)),
            ValueError,
            "taps kept as 'full' come with a scale",
        ),
    ],
)
def test_bad_input(change, error, message):
    h_in, y_in, y_out, carry, x, t, parameters = opcheck_arguments()
    arguments = dict(h_in=h_in, y_in=y_in, y_out=y_out, taps=x, t=t, carry=carry, **parameters)
    arguments |= dict(storage="full", scale=None)
    for name, spoil in change.items():
        arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=message):
        ops.highway(**arguments)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 4), (4, 3), (5, 5)], ids=str)
def test_pooling_means_what_there_is(size):
    c = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        pooled = pool_2x2(c)
    assert not saved
    expected = F.avg_pool2d(c.permute(0, 3, 1, 2), 2, ceil_mode=True).permute(0, 2, 3, 1)
    torch.testing.assert_close(pooled, expected)
    G = torch.randn_like(pooled)
    ours, theirs = (torch.autograd.grad(p, c, G)[0] for p in (pooled, expected))
    torch.testing.assert_close(ours, theirs)
