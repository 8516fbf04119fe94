"""How the taps are kept for backward: as they are, or with fewer bits and a scale for each token.

The trunk always sees the exact taps; what is kept serves the gradient of P alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

STORAGES = ("full", "fp8", "int8", "int4")
"""``full``: in the dtype of the map. ``fp8``: e4m3, round to nearest. ``int8``: round to nearest.
``int4``: stochastic rounding, so that the gradient of P stays unbiased; u (see
:func:`e3va.ops.highway`) is then kept in int8."""

DEFAULT_STORAGE = "int4"
"""On the demo its AP is that of ``full`` to within the noise of a seed."""

LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}

TINY = 1e-30
"""The largest value of a token that is stored as zero."""

CHUNK = {"cpu": 2**17, "cuda": 2**22}
"""Values that are compressed or expanded at a time: what a CPU's cache holds; elsewhere few calls,
and yet a bound on what is made in between."""


def stored_channels(channels: int, storage: str) -> int:
    """Values that a token of C = ``channels`` is stored in: two channels share a byte of int4."""
    return -(-channels // 2) if storage == "int4" else channels


def stored_dtype(storage: str) -> torch.dtype:
    """The dtype of compressed taps."""
    return {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.uint8}[storage]


def room(x: Tensor, rank: int, storage: str, *adapters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the taps of ``adapters`` sub-layers go whose outputs are like x [..., C], or that of
    one: t [*adapters, N, α], and what :func:`compress` returns, [*adapters, N, bytes] and
    [*adapters, N]; empty where taps are kept in full."""
    tokens, channels = x.shape[:-1].numel(), x.shape[-1]
    t = x.new_empty(*adapters, tokens, rank)
    if storage == "full":
        return t, x.new_empty(*adapters, 0), x.new_empty(*adapters, 0)
    shape = *adapters, tokens, stored_channels(channels, storage)
    codes = x.new_empty(shape, dtype=stored_dtype(storage))
    return t, codes, x.new_empty(*adapters, tokens, dtype=torch.float32)


def returns_norm(norm_weight: Tensor | None, P: Tensor | None, tap: str, storage: str) -> bool:
    """Whether the second result of ``sublayer_epilogue`` is a norm, not empty."""
    return norm_weight is not None or (P is not None and tap == "norm" and storage == "full")


def compress(
    x: Tensor, storage: str, seed: int | Tensor, into: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """A tap [..., C] in fewer bits.

    Args:
        x: the tap, N tokens.
        storage: "fp8", "int8" or "int4".
        seed: of int4's stochastic rounding, a number or an integer [].
        into: what is written and returned; default: new tensors.

    Returns:
        codes [N, C], or [N, ⌈C/2⌉] of int4: channel j in the low four bits of byte j, channel
        j + ⌈C/2⌉ in the high ones, both offset by 8; scale [N] float32: x ≈ codes·scale.
    """
    rows = x.flatten(0, -2)
    channels = rows.shape[1]
    codes, scale = into or room(x, 0, storage)[1:]
    for part in _parts(rows, channels):
        place = part.start * codes.shape[1]
        codes[part], scale[part] = _compress(rows[part].float(), storage, seed, place)
    return codes, scale


def _compress(rows: Tensor, storage: str, seed: int | Tensor, place: int) -> tuple[Tensor, Tensor]:
    tokens, channels = rows.shape
    largest = rows.abs().amax(1) if channels else rows.new_zeros(tokens)
    limit = torch.full_like(largest, LARGEST[storage])  # a number would be multiplied by 1/largest
    # What is smaller than TINY is zero: its inverse would overflow.
    inverse = torch.where(largest > TINY, limit / largest, 0.0)[:, None]
    if storage == "fp8":
        return (rows * inverse).clamp(-448, 448), largest / limit
    if storage == "int8":
        return (rows * inverse).round(), largest / limit
    # In fixed point of 16 bits after the point; no sum leaves [1, 16).
    bytes_ = stored_channels(channels, storage)
    fixed = torch.full((tokens, 2 * bytes_), 8 << 16, dtype=torch.int32, device=rows.device)
    fixed[:, :channels] += (rows * (inverse * 2.0**16)).to(torch.int32)
    random = random_words(tokens * bytes_, seed, place, rows.device).view(tokens, bytes_)
    fixed[:, :bytes_] += random & 0xFFFF
    fixed[:, bytes_:] += (random >> 16) & 0xFFFF
    codes = ((fixed >> 16) & 15).to(torch.uint8)
    return codes[:, :bytes_] | codes[:, bytes_:] << 4, largest / limit


def expand(codes: Tensor, scale: Tensor, storage: str, channels: int, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`compress`: [N, C] in ``dtype``."""
    x = torch.empty(len(codes), channels, dtype=dtype, device=codes.device)
    for part in _parts(codes, channels):
        values = codes[part]
        if storage == "int4":
            values = torch.cat([values & 15, values >> 4], dim=1)[:, :channels]
        offset = 8 if storage == "int4" else 0
        x[part] = (values.float() - offset) * scale[part, None]
    return x


def keep(u: Tensor, storage: str) -> tuple[Tensor, Tensor]:
    """u [K, N, r] in full or in int8, and its scales [K, N] float32, if any."""
    if storage == "full":
        return u, u.new_empty(0, dtype=torch.float32)
    codes, scale = compress(u, storage, seed=0)
    return codes.view(u.shape), scale.view(u.shape[:2])


def kept_in_full(u: Tensor, scale: Tensor | None, like: Tensor) -> Tensor:
    """The inverse of :func:`keep`, in the dtype of ``like``."""
    if scale is None:
        return u
    return expand(u.flatten(0, 1), scale.flatten(), "int8", u.shape[-1], like.dtype).view(u.shape)


def _parts(rows: Tensor, channels: int) -> Iterator[slice]:
    step = max(1, CHUNK.get(rows.device.type, CHUNK["cuda"]) // max(1, channels))
    return (slice(first, min(first + step, len(rows))) for first in range(0, len(rows), step))


def random_words(count: int, seed: int | Tensor, place: int, device: torch.device) -> Tensor:
    """``count`` int32 of random bits: hashes of the positions from ``place`` on, the same on every
    backend. A seed on the device is never looked at from the CPU, so that a CUDA graph that draws
    it gives other bits at each replay."""
    if not isinstance(seed, Tensor):
        seed = torch.tensor(int32(seed), device="cpu")
    key = _hash(seed.to(device).to(torch.int32))
    x = torch.arange(count, dtype=torch.int32, device=device)
    x += int32(place)
    x ^= key
    return _hash(x)


def int32(number: int) -> int:
    """The int32 of the same lowest 32 bits."""
    return (number + 2**31) % 2**32 - 2**31


def _hash(x: Tensor) -> Tensor:
    """A bijection of 32 bits with little bias (C. Wellons' lowbias32), in place, in int32."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= int32(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x
