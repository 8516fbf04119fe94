"""Offsets beyond 2³¹ elements, where 32 bits do not reach.

The launchers get tensors of that size on PyTorch's meta device; of their memory exists only what
the last programs touch, so that any other access is out of bounds. What they do there they also do,
to the last bit, near the start of small tensors.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not executed")

from e3va.kernels import (
    adapters,
    adapters_backward,
    common,
    stage_exit,
    sublayer_epilogue,
    tap_gradient,
)
from e3va.ops.storage import compress
from tests.ptx.memory import GlobalMemory

DTYPE = torch.bfloat16
FAR = 1 << 31


def launch_of(gpu, kernel):
    return [launch for launch in gpu.launches if launch.kernel == kernel][-1]


def vast(*shape, dtype=DTYPE):
    return torch.empty(shape, dtype=dtype, device="meta")


def raw(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)


def compare(gpu, far, near, block, places, outputs):
    """Executes one block of a launch, and compares what it writes.

    Args:
        gpu: that noted the launch ``far``.
        far, near: launches, the latter executed.
        block: along the three axes.
        places: by argument, (where in far, where in near, elements) of what is there.
        outputs: arguments that are written, and uninitialised before.
    """
    memory, written = GlobalMemory(), []
    for name, pieces in places.items():
        vast_tensor, small = far.arguments[name], near.arguments[name].flatten()
        size = small.element_size()
        for at, start, count in pieces:
            piece = small[start : start + count].clone()
            expected = piece.clone()
            is_output = name in outputs
            if is_output:
                raw(piece)[:] = 0xAB
                written.append((name, piece, expected))
            memory.add(
                f"{name} at {at}",
                piece.view(torch.uint8).numpy().reshape(-1),
                address=gpu.address_of(vast_tensor) + at * size,
                initialised=not is_output,
                read_only=not is_output,
            )
    x, y, z = (*far.grid, 1, 1)[:3]
    assert all(0 <= i < n for i, n in zip(block, (x, y, z), strict=True))
    gpu.run(far, memory, blocks=[block[0] + x * (block[1] + y * block[2])])
    for name, piece, expected in written:
        assert torch.equal(piece, expected), name


def everything(launch, *names):
    return {name: [(0, 0, launch.arguments[name].numel())] for name in names}


def test_sublayer_epilogue(device):
    C, r, rows = 64, 16, 16
    N = FAR // C + 5
    first = N // rows * rows  # of the last program
    n = N - first
    x, y, P = torch.randn(n, C).to(DTYPE), torch.randn(n, C).to(DTYPE), torch.randn(C, r).to(DTYPE)
    norm = torch.randn(2, C).unbind()
    with device(80) as gpu:
        sublayer_epilogue.sublayer_epilogue(x, y, *norm, 1e-5, P, "output", "int8")
    near = launch_of(gpu, "sublayer_epilogue_kernel")
    norm = vast(C, dtype=torch.float32), vast(C, dtype=torch.float32)
    with device(80, execute=False) as gpu:
        sublayer_epilogue.sublayer_epilogue(
            vast(N, C), vast(N, C), *norm, 1e-5, vast(C, r), "output", "int8"
        )
    far = launch_of(gpu, "sublayer_epilogue_kernel")
    outputs = {"y_out_ptr": C, "z_ptr": C, "t_ptr": r, "codes_ptr": C, "scale_ptr": 1}
    places = everything(near, "P_ptr", "norm_weight_ptr", "norm_bias_ptr")
    for name, width in {"x_ptr": C, "y_ptr": C, **outputs}.items():
        places[name] = [(first * width, 0, n * width)]
    compare(gpu, far, near, (first // rows, 0, 0), places, outputs)


K, RANK, HIDDEN, SIZE, IMAGES = 2, 16, 32, (3, 5), 3


def stage(make, N, count=K, rank=RANK, hidden=HIDDEN):
    """t, carry, D, γ, g, Q, b, U, g of U."""
    return (
        make(count, N, rank),
        None,
        make(count, rank, 3, 3),
        None,
        make(count, 1, rank, rank),
        make(count, rank, hidden),
        make(count, hidden),
        make(count, hidden, rank),
        make(count, 1, rank, rank),
    )


def normal(*shape):
    return torch.randn(*shape).to(DTYPE)


def end_of_map(near, N, n, rows, pointers):
    """(the first row of the last program, places): all parameters, and what that program touches of
    the last tap."""
    first = (N - 1) // rows * rows
    places = everything(near, "D_ptr", "Q_ptr", "b_ptr", "U_ptr")
    for name, kind in pointers.items():
        if kind == "input":  # [K, N, r]: what lies around the rows, too
            places[name] = [((K * N - n) * RANK, (K - 1) * n * RANK, n * RANK)]
        elif kind == "output":
            count = N - first
            places[name] = [((K * N - count) * RANK, (K * n - count) * RANK, count * RANK)]
        else:  # [N, K·r]: the columns of the last tap
            places[name] = [
                ((row * K + K - 1) * RANK, ((row - N + n) * K + K - 1) * RANK, RANK)
                for row in range(first, N)
            ]
    return first, places


def test_adapters(device):
    n = SIZE[0] * SIZE[1] * IMAGES
    N = (FAR // RANK // n + 1) * n
    with device(80) as gpu:
        adapters.adapters(*stage(normal, n), SIZE)
    near = launch_of(gpu, "adapters_kernel")
    with device(80, execute=False) as gpu:
        adapters.adapters(*stage(vast, N), SIZE)
    far = launch_of(gpu, "adapters_kernel")
    rows = far.arguments["ROWS"]
    first, places = end_of_map(near, N, n, rows, {"u_ptr": "input", "S_ptr": "columns"})
    compare(gpu, far, near, (first // rows, K - 1, 0), places, {"S_ptr"})


def backward(make, N, count=K, rank=RANK, hidden=HIDDEN, size=SIZE):
    t, _, *rest = stage(make, N, count, rank, hidden)
    return make(N, count * rank), None, t, None, *rest, size


def backward_launches(gpu):
    """The first one, and the last, which gathers what neighbours give to a gradient."""
    launches = [launch for launch in gpu.launches if launch.kernel == "adapters_backward_kernel"]
    return launches[0], launches[-1]


def test_adapters_backward(device):
    """Of so many tokens that those of the last tap lie far out."""
    n = SIZE[0] * SIZE[1] * IMAGES
    whole = 64 * SIZE[0] * SIZE[1]
    N = n + (FAR // RANK // whole + 1) * whole  # the last program has n rows
    with device(80) as gpu:
        adapters_backward.adapters_backward(*backward(normal, n))
    near = backward_launches(gpu)
    with device(80, execute=False) as gpu:
        adapters_backward.adapters_backward(*backward(vast, N))
    far = backward_launches(gpu)
    parts, slot = far[0].grid[0], near[0].grid[1] - 1
    rows = far[0].arguments["ROWS"]
    pointers = {"u_ptr": "input", "dS_ptr": "columns", "S_ptr": "columns", "dmixed_ptr": "output"}
    first, places = end_of_map(near[0], N, n, rows, pointers)
    assert N - first == n
    width = far[0].arguments["sums_ptr"].shape[-1]
    places["sums_ptr"] = [((parts - 1) * width, slot * width, width)]
    outputs = {"S_ptr", "dmixed_ptr", "sums_ptr"}
    compare(gpu, far[0], near[0], (parts - 1, 0, 0), places, outputs)
    pointers = {"dmixed_ptr": "input", "u_ptr": "input", "dt_ptr": "output"}
    _, places = end_of_map(near[1], N, n, rows, pointers)
    places["dD_ptr"] = [((parts * K - 1) * 9 * RANK, (K - 1) * 9 * RANK, 9 * RANK)]
    compare(gpu, far[1], near[1], (parts - 1, K - 1, 0), places, {"dt_ptr", "dD_ptr"})


def test_many_adapters_backward(device):
    """Of so many adapters that the last one lies far out."""
    count, N, rank, hidden, size = 60000, 570, 64, 576, (19, 30)
    with device(80) as gpu:
        adapters_backward.adapters_backward(*backward(normal, N, 1, rank, hidden, size))
    near = backward_launches(gpu)
    with device(80, execute=False) as gpu:
        adapters_backward.adapters_backward(*backward(vast, N, count, rank, hidden, size))
    far = backward_launches(gpu)
    parts, slots = far[0].grid[:2]
    first = (parts - 1) * far[0].arguments["ROWS"]

    def last_tap(width, start=0):
        return [((count - 1) * width + start, start, width - start)]

    def columns(start):
        return [((row * count + count - 1) * rank, row * rank, rank) for row in range(start, N)]

    weight, narrow = rank * hidden, N * rank
    width = far[0].arguments["sums_ptr"].shape[-1]
    places = {
        "dS_ptr": columns(0),
        "u_ptr": last_tap(narrow),
        "D_ptr": last_tap(9 * rank),
        "Q_ptr": last_tap(weight),
        "b_ptr": last_tap(hidden),
        "U_ptr": last_tap(weight),
        "S_ptr": columns(first),
        "dmixed_ptr": last_tap(narrow, first * rank),
        "sums_ptr": [((slots * parts - 1) * width, (parts - 1) * width, width)],
    }
    outputs = {"S_ptr", "dmixed_ptr", "sums_ptr"}
    compare(gpu, far[0], near[0], (parts - 1, slots - 1, 0), places, outputs)
    places = {name: last_tap(narrow) for name in ("u_ptr", "dmixed_ptr")}
    places["D_ptr"] = last_tap(9 * rank)
    places["dt_ptr"] = last_tap(narrow, first * rank)
    places["dD_ptr"] = [((parts * count - 1) * 9 * rank, (parts - 1) * 9 * rank, 9 * rank)]
    compare(gpu, far[1], near[1], (parts - 1, count - 1, 0), places, {"dt_ptr", "dD_ptr"})


def test_tap_gradient(device, monkeypatch):
    """Of so many channels that the last rows lie far out."""
    monkeypatch.setattr(common, "SPLITS", 1)
    C, N, r, tile = 1 << 21, (1 << 10) + 30, 16, 256
    codes, scale = compress(torch.randn(N, tile), "int8", 5)
    with device(80) as gpu:
        tap_gradient.tap_gradient(codes[None], scale[None], "int8", normal(1, N, r), tile)
    near = launch_of(gpu, "tap_gradient_kernel")
    codes, scale = vast(1, N, C, dtype=torch.int8), vast(1, N, dtype=torch.float32)
    with device(80, execute=False) as gpu:
        tap_gradient.tap_gradient(codes, scale, "int8", vast(1, N, r), C)
    far = launch_of(gpu, "tap_gradient_kernel")
    assert far.arguments["CHANNEL_TILE"] == tile
    places = everything(near, "scale_ptr", "dt_ptr")
    words, tile_words = C // 4, tile // 4
    places["words_ptr"] = [
        ((row + 1) * words - tile_words, row * tile_words, tile_words) for row in range(N)
    ]
    places["dP_ptr"] = [((C - tile) * r, 0, tile * r)]
    compare(gpu, far, near, (0, C // tile - 1, 0), places, {"dP_ptr"})


def test_stage_exit_backward(device):
    """Four images of odd sides are whole programs; the last one is of one."""
    H, W, C = 3, 5, 64
    before = (FAR // (H * W * C) // 4 + 1) * 4  # images

    def arguments(make, B):
        dp, dgathered, p = make(B, H, W, C), make(B, 2, 3, 4 * C), make(B, H, W, C)
        shapes = (B * H * W,), (B * H * W,), (C,), (C,), (4 * C,)
        return dp, dgathered, p, *(make(*shape).float() for shape in shapes), 1e-5

    with device(80) as gpu:
        stage_exit.stage_exit_backward(*arguments(normal, 1))
    near = launch_of(gpu, "stage_exit_backward_kernel")
    with device(80, execute=False) as gpu:
        stage_exit.stage_exit_backward(*arguments(vast, before + 1))
    far = launch_of(gpu, "stage_exit_backward_kernel")
    parts = far.grid[0]
    places = everything(near, "weight_ptr", "bias_ptr", "merge_weight_ptr")
    widths = {"dp_ptr": C, "p_ptr": C, "mean_ptr": 1, "rstd_ptr": 1, "dh_ptr": C}
    for name, width in widths.items():
        places[name] = [(before * H * W * width, 0, H * W * width)]
    places["dgathered_ptr"] = [(before * 24 * C, 0, 24 * C)]
    places["sums_ptr"] = [((i * parts + parts - 1) * C, i * C, C) for i in range(2)]
    compare(gpu, far, near, (parts - 1, 0, 0), places, {"dh_ptr", "sums_ptr"})
