"""The compiled backend: ``csrc/``, built into ``e3va/_C.abi3.so`` by setup.py, loaded when needed.

Nothing here fails when it was not built: the reason is a sentence, for the dispatcher and for
``e3va info``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from e3va.ops.backends import reference
from e3va.ops.backends.registry import register
from e3va.ops.functional import fold, fold_backward
from e3va.ops.storage import STORAGES, keep, kept_in_full, returns_norm, room
from e3va.ops.variants import WindowAttention

_FOLDER = Path(__file__).parents[2]
_PARTS = {"cpu": "C++", "cuda": "CUDA"}
HEAD_DIM, LARGEST_WINDOW = 32, 12  # of csrc/cuda/window_attention.cu
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class BuildInfo:
    """What setup.py built, as it wrote it down.

    Attributes:
        built: parts there are: "C++", "CUDA".
        architectures: processors they were built for: "x86_64", "sm_80", "compute_120" (PTX), …
        left_out: part → why it was not built.
        torch: version whose headers were used.
        compilers: what compiled.
    """

    built: list[str] = field(default_factory=list)
    architectures: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    torch: str = ""
    compilers: list[str] = field(default_factory=list)


@functools.cache
def build_info() -> BuildInfo:
    """What was built here, and what was left out and why."""
    path = _FOLDER / "_build_info.json"
    if not path.is_file():
        reason = "the package was never built: pip install -e ."
        return BuildInfo(left_out=dict.fromkeys(_PARTS.values(), reason))
    try:
        info = BuildInfo(**json.loads(path.read_text()))
        empty = BuildInfo()
        for name, value in vars(info).items():
            if type(value) is not type(getattr(empty, name)):
                raise TypeError(f"{name} is {value!r}")
        return info
    except (ValueError, TypeError, RecursionError) as error:
        reason = f"{path} is damaged ({error}): build anew with pip install -e ."
        return BuildInfo(left_out=dict.fromkeys(_PARTS.values(), reason))


@functools.cache
def load_error() -> str | None:
    """Loads the library that was built; None, or what went wrong."""
    try:
        torch.ops.load_library(_FOLDER / "_C.abi3.so")
    except (OSError, RuntimeError) as error:
        return f"the extension was built but does not load: {error.__cause__ or error}"
    _register_fakes()
    return None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where compiled kernels run for tensors of ``device`` and ``dtype``, else the reason."""
    part = _PARTS.get(device.type)
    if part is None:
        return f"there are no compiled kernels for {device.type}"
    info = build_info()
    if part not in info.built:
        return f"its {part} part was not built: {info.left_out.get(part, 'unknown reason')}"
    if dtype not in _DTYPES:
        return f"it computes in float32, not in {str(dtype).removeprefix('torch.')}"
    return load_error()


def _window_attention_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    reason = why_not(device, dtype)
    if reason is None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if not any(_runs(code, 10 * major + minor) for code in build_info().architectures):
            return (
                f"it has no code for sm_{major}{minor}: build it with TORCH_CUDA_ARCH_LIST="
                f"{major}.{minor}"
            )
    return reason


def _runs(code: str, architecture: int) -> bool:
    """Whether a GPU, 89 for sm_89, runs machine code ("sm_80") or PTX ("compute_80"); "sm_90a" is
    for sm_90 alone, "sm_100f" for its family."""
    kind, _, number = code.partition("_")
    if not number.rstrip("af").isdecimal():
        return False
    made_for = int(number.rstrip("af"))
    if number.endswith("a"):
        return made_for == architecture
    if kind == "sm" or number.endswith("f"):
        return made_for // 10 == architecture // 10 and made_for <= architecture
    return kind == "compute" and made_for <= architecture


def _window_attention_cannot(device: torch.device, variant: WindowAttention) -> str | None:
    if device.type == "cuda" and variant.head_dim != HEAD_DIM:
        return f"its CUDA kernel has heads of {HEAD_DIM} channels, not of {variant.head_dim}"
    if device.type == "cuda" and variant.window > LARGEST_WINDOW:
        return f"its CUDA kernel has windows up to {LARGEST_WINDOW}, not of {variant.window} tokens"
    return None


def _cpu_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"its compiled kernel runs on CPUs, not on {device.type}"
    return why_not(device, dtype)


@register("sublayer_epilogue", "native", why_not=_cpu_why_not)
def sublayer_epilogue(
    x: Tensor,  # [..., C]
    y: Tensor,  # [..., C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    P: Tensor | None = None,  # [C, r]
    tap: str = "output",
    storage: str = "full",
    seed: Tensor | None = None,
    index: int = 0,
    into: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:
    z = x.new_empty(x.shape if returns_norm(norm_weight, P, tap, storage) else 0)
    if not into:
        into = [x.new_empty(0)] * 3 if P is None else room(x, P.shape[1], storage)
    weights = _given(norm_weight), _given(norm_bias), eps, _given(P)
    form = tap == "norm", STORAGES.index(storage), index + (0 if seed is None else int(seed))
    y_out = torch.ops.e3va_native.sublayer_epilogue(
        x.contiguous(), y.contiguous(), *weights, *form, z, *into
    )
    return y_out, z, *into


@register("adapters", "native", why_not=_cpu_why_not)
def adapters(
    t: Tensor,  # [K, N, r]
    carry: Tensor | None,  # [N, r]
    D: Tensor | None,  # [K, r, side, side]
    gamma: Tensor | None,  # [K, r]
    g: Tensor,  # [K, branches, d, d]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    g_up: Tensor,  # [K, branches, d, d]
    size: tuple[int, int],
    storage: str = "full",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, before = t.contiguous(), None if carry is None else carry.contiguous()
    Q, U = fold(g, Q, U, g_up)
    weights = _given(D), _given(gamma), _weight(Q), _weight(b), _weight(U)
    S, u, after = torch.ops.e3va_native.adapters(t, before, *weights, *size)
    if gamma is None and storage != "full":
        u = t
    return S, after, *keep(u, storage)


@register("adapters_backward", "native", why_not=_cpu_why_not)
def adapters_backward(
    dS: Tensor,  # [N, K·r]
    dcarry: Tensor | None,  # [N, r]
    u: Tensor,  # [K, N, r]
    scale: Tensor | None,  # [K, N], of u in int8
    D: Tensor | None,  # [K, r, side, side]
    gamma: Tensor | None,  # [K, r]
    g: Tensor,  # [K, branches, d, d]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    g_up: Tensor,  # [K, branches, d, d]
    size: tuple[int, int],
) -> tuple[Tensor, ...]:
    after = None if dcarry is None else dcarry.contiguous()
    u = kept_in_full(u, scale, dS).contiguous()
    folded = fold(g, Q, U, g_up)
    weights = _given(D), _given(gamma), _weight(folded[0]), _weight(b), _weight(folded[1])
    D, _, *others = weights
    dD, dQ, db, dU = (
        dS.new_empty(0 if w is None else w.shape, dtype=torch.float32) for w in (D, *others)
    )
    results = torch.ops.e3va_native.adapters_backward(
        dS.contiguous(), after, u, *weights, *size, dD, dQ, db, dU
    )
    dg, dQ, dU, dg_up = fold_backward(dQ, dU, g, Q, U, g_up)
    return *results, dD, dg, dQ, db, dU, dg_up


@register("tap_gradient", "native", why_not=_cpu_why_not)
def tap_gradient(
    taps: Sequence[Tensor] | Tensor,  # K × [N, C], or as kept, [K, N, bytes]
    scale: Tensor | None,  # [K, N]
    storage: str,
    dt: Tensor,  # [K, N, r]
    channels: int,
) -> Tensor:
    rows = [tap_k.contiguous() for tap_k in taps]
    scales = [] if scale is None else list(scale.contiguous())
    return torch.ops.e3va_native.tap_gradient(
        rows, scales, STORAGES.index(storage), dt.contiguous(), channels, dt.new_empty(0).float()
    )


# PyTorch's own kernels, so that "native" runs whole backbones: launches cost little on a CPU.
register("stage_exit_backward", "native", why_not=_cpu_why_not)(reference.stage_exit_backward)


@register("window_attention", "native", _window_attention_why_not, _window_attention_cannot)
def window_attention(
    qkv: Tensor,  # [B, H, W, 3C]
    qkv_bias: Tensor,  # [3C]
    position_bias: Tensor,  # [(2w-1)², heads]
    window: int,
    shift: int,
) -> Tensor:
    return torch.ops.e3va_native.window_attention(
        qkv.contiguous(),
        qkv_bias.to(qkv.dtype).contiguous(),
        position_bias.to(qkv.dtype).contiguous(),
        window,
        shift,
    )


def _weight(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()


def _given(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _weight(tensor)


@functools.cache
def _register_fakes() -> None:
    """What comes of the kernels, on shapes alone: they run within the ops, whose own fakes PyTorch
    knows."""
    fake = torch.library.register_fake

    @fake("e3va_native::window_attention")
    def _(qkv, qkv_bias, position_bias, window, shift):
        return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)

    @fake("e3va_native::sublayer_epilogue")
    def _(x, y, *others):
        return torch.empty_like(y)

    @fake("e3va_native::adapters")
    def _(t, carry, D, gamma, Q, b, U, height, width):
        adapters, tokens, rank = t.shape
        u, after = (t.shape, (tokens, rank)) if gamma is not None else ((0,), (0,))
        return t.new_empty(tokens, adapters * rank), t.new_empty(u), t.new_empty(after)

    @fake("e3va_native::adapters_backward")
    def _(dS, dcarry, u, D, gamma, Q, b, U, height, width, *sums):
        before = u.shape[1:] if gamma is not None else (0,)
        return torch.empty_like(dS), dS.new_empty(u.shape), dS.new_empty(before)

    @fake("e3va_native::tap_gradient")
    def _(taps, scale, storage, dt, channels, like):
        return like.new_empty(len(dt), channels, dt.shape[2])
