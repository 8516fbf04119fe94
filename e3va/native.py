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

from e3va.ops import dispatch
from e3va.ops.taps import TAPS, stored_channels, stored_dtype

_FOLDER = Path(__file__).parent
_PARTS = {"cpu": "C++", "cuda": "CUDA"}
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
    return BuildInfo(**json.loads(path.read_text()))


@functools.cache
def load_error() -> str | None:
    """Loads the library that was built; None, or what went wrong."""
    try:
        torch.ops.load_library(_FOLDER / "_C.abi3.so")
    except (OSError, RuntimeError) as error:
        return f"the extension was built but does not load: {error.__cause__ or error}"
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
    if reason is None and device.type == "cuda" and not dispatch.requested_backends():
        return "its CUDA kernel has not been measured yet, so it runs only when asked for"
    return reason


def _cpu_why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"its compiled kernel runs on CPUs, not on {device.type}"
    return why_not(device, dtype)


@dispatch.register("sublayer_epilogue", "native", why_not=_cpu_why_not)
def sublayer_epilogue(
    x: Tensor,  # [..., C]
    y: Tensor,  # [..., C]
    norm_weight: Tensor | None,  # [C]
    norm_bias: Tensor | None,  # [C]
    eps: float,
    P: Tensor | None = None,  # [C, r]
    Q: Tensor | None = None,  # [r, m]
    b: Tensor | None = None,  # [m]
    U: Tensor | None = None,  # [m, r]
    taps: str = "full",
    seed: int = 0,
) -> tuple[Tensor, ...]:
    norm, adapter = (
        [None if v is None else _weight(v) for v in group]
        for group in ((norm_weight, norm_bias), (P, Q, b, U))
    )
    if P is None or taps == "full":
        tap, scale = x.new_empty(0), torch.empty(0)
    else:
        tokens, channels = x.shape[:-1].numel(), x.shape[-1]
        tap = torch.empty(tokens, stored_channels(channels, taps), dtype=stored_dtype(taps))
        scale = torch.empty(tokens)
    results = torch.ops.e3va_native.sublayer_epilogue(
        x.contiguous(), y.contiguous(), *norm, eps, *adapter, TAPS.index(taps), seed, tap, scale
    )
    return *results, tap, scale


@dispatch.register("highway_backward", "native", why_not=_cpu_why_not)
def highway_backward(
    G: Tensor,  # [N, C]
    x: Sequence[Tensor],  # K × [N, C], or as stored
    scale: Sequence[Tensor],  # K × [N], or none
    taps: str,
    t: Sequence[Tensor],  # K × [N, r]
    P: Tensor,  # [K, C, r]
    Q: Tensor,  # [K, r, m]
    b: Tensor,  # [K, m]
    U: Tensor,  # [K, m, r]
    V: Tensor,  # [K, r, C]
) -> tuple[Tensor, ...]:
    channels = P.shape[1]
    dS = G @ V.flatten(0, 1).to(G).t()  # [N, K·r]
    S = torch.empty_like(dS)
    Qs, bs, Us = _weight(Q), _weight(b), _weight(U)
    gradients = []
    for k, (x_k, t_k) in enumerate(zip(x, t, strict=True)):
        scale_k = scale[k] if scale else None
        tap = x_k.contiguous(), scale_k, TAPS.index(taps), t_k.contiguous()
        flat = torch.ops.e3va_native.adapter_backward(*tap, dS, k, channels, Qs[k], bs[k], Us[k], S)
        gradients.append(flat.split([P[k].numel(), Q[k].numel(), U[k].numel(), b[k].numel()]))
    dP, dQ, dU, db = (torch.stack(each) for each in zip(*gradients, strict=True))
    return (
        dP.view(P.mT.shape).mT.contiguous().to(P.dtype),
        dQ.view(Q.shape).to(Q.dtype),
        db.to(b.dtype),
        dU.view(U.mT.shape).mT.contiguous().to(U.dtype),
        (S.t() @ G).view(V.shape).to(V.dtype),
        G.sum(0, dtype=torch.float32).to(V.dtype),
    )


@dispatch.register("window_attention", "native", why_not=_window_attention_why_not)
def window_attention(
    qkv: Tensor,  # [B, H, W, 3C]
    qkv_bias: Tensor,  # [3C]
    position_bias: Tensor,  # [(2w-1)², heads]
    window: int,
    shift: int,
) -> Tensor:
    return torch.ops.e3va_native.window_attention(
        qkv.contiguous(),
        _weight(qkv_bias),
        _weight(position_bias),
        window,
        shift,
    )


def _weight(tensor: Tensor) -> Tensor:
    return tensor.float().contiguous()
