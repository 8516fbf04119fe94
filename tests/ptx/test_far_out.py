"""Offsets beyond 2³¹ elements, where 32 bits do not reach.

The launchers get tensors of that size on PyTorch's meta device; of their memory exists only what
the last programs touch, so that any other access is out of bounds. What they do there they also do,
to the last bit, near the start of small tensors.
"""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its kernels are not executed")

from e3va.kernels import adapters, common, sublayer_epilogue, tap_gradient
from e3va.ops.taps import compress
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


def stage(make, N, taps=K, rank=RANK, hidden=HIDDEN):
    """t, carry, D, γ, Q, b, U, (H, W)."""
    return (
        make(taps, N, rank),
        None,
        make(taps, rank, 3, 3),
        None,
        make(taps, rank, hidden),
        make(taps, hidden),
        make(taps, hidden, rank),
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


def test_rows(device):
    """Backward of the last adapter; then what its neighbours give to its gradient."""
    n = SIZE[0] * SIZE[1] * IMAGES
    N = (FAR // RANK // n + 1) * n

    def backward(make, N):
        t, _, *rest = stage(make, N)
        return make(N, K * RANK), None, t, *rest, SIZE

    with device(80) as gpu:
        adapters.adapters_backward(*backward(normal, n))
    near = [launch for launch in gpu.launches if launch.kernel == "rows_kernel"]
    with device(80, execute=False) as gpu:
        adapters.adapters_backward(*backward(vast, N))
    far = [launch for launch in gpu.launches if launch.kernel == "rows_kernel"]
    rows = far[0].arguments["ROWS"]
    pointers = {"u_ptr": "input", "dS_ptr": "columns", "S_ptr": "columns"}
    pointers |= {"mixed_ptr": "output", "dmixed_ptr": "output"}
    first, places = end_of_map(near[0], N, n, rows, pointers)
    block = first // rows, K - 1, 0
    compare(gpu, far[0], near[0], block, places, {"S_ptr", "mixed_ptr", "dmixed_ptr"})
    pointers = {"dmixed_ptr": "input", "dt_ptr": "output"}
    _, places = end_of_map(near[1], N, n, rows, pointers)
    compare(gpu, far[1], near[1], block, places, {"dt_ptr"})


def test_weights_and_mixing(device, monkeypatch):
    """Of so many taps that the last one lies far out."""
    monkeypatch.setattr(common, "SPLITS", 1)
    taps, N, rank, hidden = 60000, 570, 64, 576

    def backward(make, taps):
        t, _, *rest = stage(make, N, taps, rank, hidden)
        return make(N, taps * rank), None, t, *rest, (19, 30)

    with device(80) as gpu:
        adapters.adapters_backward(*backward(normal, 1))
    near = {name: launch_of(gpu, name) for name in ("weights_kernel", "mixing_kernel")}
    with device(80, execute=False) as gpu:
        adapters.adapters_backward(*backward(vast, taps))
    far = {name: launch_of(gpu, name) for name in near}

    def last_tap(width):
        return [((taps - 1) * width, 0, width)]

    slices = far["weights_kernel"].grid[1]
    start = (slices - 1) * far["weights_kernel"].arguments["HIDDEN_TILE"]
    tile = hidden - start
    weight = rank * hidden
    before = (taps - 1) * weight
    columns = [(row * taps * rank + (taps - 1) * rank, row * rank, rank) for row in range(N)]
    places = {
        "mixed_ptr": last_tap(N * rank),
        "ds_ptr": columns,
        "Q_ptr": last_tap(weight),
        "b_ptr": last_tap(hidden),
        "U_ptr": last_tap(weight),
        "dQ_ptr": [(before + i * hidden + start, i * hidden + start, tile) for i in range(rank)],
        "db_ptr": [((taps - 1) * hidden + start, start, tile)],
        "dU_ptr": [(before + start * rank, start * rank, tile * rank)],
    }
    outputs = {"dQ_ptr", "db_ptr", "dU_ptr"}
    block = 0, slices - 1, taps - 1
    compare(gpu, far["weights_kernel"], near["weights_kernel"], block, places, outputs)

    n = 5  # the neighbour
    places = {name: last_tap(N * rank) for name in ("u_ptr", "dmixed_ptr")}
    places["dD_ptr"] = [((taps - 1) * rank * 9 + i * 9 + n, i * 9 + n, 1) for i in range(rank)]
    compare(gpu, far["mixing_kernel"], near["mixing_kernel"], (0, n, taps - 1), places, {"dD_ptr"})


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
