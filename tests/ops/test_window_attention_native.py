import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import e3va
from e3va import ops
from e3va.ops.backends import native, reference
from tests.ops.backends import DEVICES
from tests.oracles import relative_error

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Relative error allowed by float32 arithmetic and one rounding at the store."""


@pytest.fixture(autouse=True)
def compiled():
    """Skips only what could not be built; what was built must run."""
    left_out = native.build_info().left_out.get("C++")
    if left_out:
        pytest.skip(f"compiled kernels left untested: {left_out}")


def make_arguments(B, H, W, heads, head_dim, window, dtype):
    qkv = torch.randn(B, H, W, 3 * heads * head_dim)
    bias, table = torch.randn(qkv.shape[-1]), torch.randn((2 * window - 1) ** 2, heads)
    return qkv.to(dtype), bias.to(dtype), table.to(dtype)


def check(arguments, window, shift, tolerance, device="cpu"):
    left_out = native.build_info().left_out.get("CUDA")
    if device == "cuda" and left_out:
        pytest.skip(f"the CUDA kernels are left untested: {left_out}")
    expected = reference.window_attention(*(a.double() for a in arguments), window, shift)
    with e3va.backend("native"):
        actual = ops.window_attention(*(a.to(device) for a in arguments), window, shift).cpu()
    assert actual.dtype == arguments[0].dtype and actual.is_contiguous()
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= tolerance
    return actual


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [7, 12])
@pytest.mark.parametrize(
    "B, H, W",
    [
        (1, 1, 1),  # padding but for one token
        (1, 5, 4),  # smaller than a window
        (1, 12, 7),  # exactly one window along an axis
        (2, 14, 24),  # whole windows
        (2, 17, 31),  # primes
        (0, 8, 8),  # an empty batch
        (2, 0, 8),  # empty maps
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_matches_float64(B, H, W, window, shifted, dtype, device):
    arguments = make_arguments(B, H, W, 3, 32, window, dtype)
    check(arguments, window, window // 2 if shifted else 0, ROUNDING[dtype], device)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("window", range(1, 13))
@pytest.mark.parametrize("device", DEVICES)
def test_any_window(window, dtype, device):
    arguments = make_arguments(1, 9, 13, 2, 32, window, dtype)
    for shift in {0, 1 % window, window - 1}:
        check(arguments, window, shift, ROUNDING[dtype], device)


@pytest.mark.parametrize("window, heads, head_dim", [(1, 1, 1), (2, 5, 3), (3, 2, 17), (4, 1, 64)])
def test_any_window_and_head(window, heads, head_dim):
    arguments = make_arguments(2, 5, 6, heads, head_dim, window, torch.float32)
    for shift in range(window):
        check(arguments, window, shift, 1e-6)


def test_non_contiguous_and_mixed_dtypes():
    qkv, bias, table = make_arguments(2, 9, 10, 2, 8, 7, torch.bfloat16)
    transposed = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    assert not transposed.is_contiguous()
    arguments = transposed, bias.float().repeat(2)[::2].contiguous(), table.double()
    check(arguments, 7, 3, ROUNDING[torch.bfloat16])


def test_one_thread_and_many_agree():
    arguments = make_arguments(2, 20, 20, 4, 32, 7, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = check(arguments, 7, 3, 1e-6)
        torch.set_num_threads(3)
        assert torch.equal(check(arguments, 7, 3, 1e-6), alone)
    finally:
        torch.set_num_threads(threads)


def test_extreme_scores():
    """Scores far apart, and values of all sizes a half can hold."""
    qkv, bias, table = make_arguments(1, 7, 7, 2, 32, 7, torch.float32)
    check((qkv * 30, bias, table), 7, 0, 1e-5)
    half = (torch.logspace(-8, 4.8, 3 * 64).expand(1, 7, 7, -1) * qkv.sign()).half()
    half[..., :128] *= 1e-4
    check((half, bias.half(), table.half()), 7, 3, ROUNDING[torch.float16])


def test_nan_and_infinity_stay_in_their_window():
    qkv, bias, table = make_arguments(1, 14, 14, 1, 32, 7, torch.float16)
    qkv[0, 0, 0, -1], qkv[0, 0, 8, 0] = torch.nan, torch.inf
    with e3va.backend("native"):
        out = ops.window_attention(qkv, bias, table, 7, 0)
    assert out[0, :7, :7, -1].isnan().all() and out[0, :7, :7, :-1].isfinite().all()
    assert out[0, 0, 8].isnan().all()
    assert out[0, 7:].isfinite().all()


def test_is_what_auto_picks_on_the_cpu():
    arguments = make_arguments(1, 9, 9, 2, 32, 7, torch.float32)
    with e3va.backend("auto"), torch.profiler.profile() as profile:
        ops.window_attention(*arguments, 7, 3)
    assert "e3va_native::window_attention" in {event.key for event in profile.key_averages()}


def test_what_it_cannot_do_is_said():
    arguments = make_arguments(1, 3, 3, 2, 4, 3, torch.float64)
    with e3va.backend("native"), pytest.raises(RuntimeError, match="float32, not in float64"):
        ops.window_attention(*arguments, 3, 0)
    with e3va.backend("auto"):
        assert ops.window_attention(*arguments, 3, 0).dtype == torch.float64


def test_raw_op_checks_what_would_be_read_out_of_bounds():
    native.load_error()
    qkv, bias, table = make_arguments(1, 3, 3, 2, 4, 3, torch.float32)
    op = torch.ops.e3va_native.window_attention
    for bad in (
        (qkv, bias[:-1], table, 3, 0),
        (qkv, bias, table[:-1], 3, 0),
        (qkv, bias, table, 3, 3),
        (qkv, bias, table, 3, -1),
        (qkv, bias.half(), table, 3, 0),
        (qkv.transpose(1, 2), bias, table, 3, 0),
    ):
        with pytest.raises(RuntimeError, match="window_attention:"):
            op(*bad)


@pytest.mark.parametrize("architecture", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_cuda_kernel_compiles_without_spills(architecture, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("the CUDA kernels are left uncompiled: no nvcc on PATH")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True)
    if architecture not in known.stdout.split():
        pytest.skip(f"this nvcc knows no {architecture}")
    source = CSRC / "cuda" / "window_attention.cu"
    command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas=-v", "-cubin"]
    done = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "kernel.cubin")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Per dtype a plain kernel, and per dtype of 16 bits one for each size on tensor cores.
    clean = "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert done.stderr.count(clean) == 3 + 2 * 3, done.stderr
