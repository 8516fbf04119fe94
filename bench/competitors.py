"""What :mod:`bench.kernels` measures: the fused ops, and what they replace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import e3va
from e3va import ops
from e3va.highway import HighwayStage, StageRide
from e3va.ops import dispatch, functional
from e3va.ops.backends import reference
from e3va.ops.storage import compress
from e3va.weights import convert_weights

IMAGE = (800, 1344)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OURS = "e3va"
Competitors = dict[str, Callable[[], object]]


class Case(NamedTuple):
    """One op at one shape: a stage (0–3) of a Swin, or all of it (None)."""

    op: str
    variant: str
    stage: int | None
    batch: int
    dtype: str
    image: tuple[int, int] = IMAGE
    compiled: bool = False
    """Whether eager PyTorch through torch.compile, which may take minutes, competes too."""


# Baselines ----------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """One adapter, as one would write it: s = GELU((u + D ⋆ u)·Q + b)·U of u = z·P + γ ⊙ state,
    and s·V."""

    def __init__(self, stage: HighwayStage, k: int) -> None:
        super().__init__()
        Q, U = functional.fold(stage.g, stage.Q, stage.U, stage.g_up)
        weights = {"P": stage.P[k], "Q": Q[k], "b": stage.b[k], "U": U[k], "V": stage.V[k]}
        weights |= {"D": stage.D[k][:, None], "gamma": stage.gamma[k]}
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.detach().clone()))

    def forward(self, z: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        P, Q, b, U, V, D, gamma = (
            weight.to(z) for weight in (self.P, self.Q, self.b, self.U, self.V, self.D, self.gamma)
        )
        u = z @ P + gamma * state
        around = F.conv2d(u.permute(0, 3, 1, 2), D, padding=D.shape[-1] // 2, groups=len(D))
        s = F.gelu((u + around.permute(0, 2, 3, 1)) @ Q + b) @ U
        return s, s @ V


def one_at_a_time(
    adapters: nn.ModuleList,
    c: Tensor,
    norm: nn.LayerNorm,
    x: list[Tensor],
    y: Tensor,
    h: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """A stage's residual adds, norms and highway, adapter by adapter: the highway and the state."""
    for adapter, x_k in zip(adapters, x, strict=True):
        with torch.no_grad():
            y = y + x_k
            z = F.layer_norm(y, y.shape[-1:], norm.weight.to(y), norm.bias.to(y), norm.eps)
        s, added = adapter(z, state)
        state = state + s
        h = h + x_k + added
    return h + c.to(h), state


class SwinAttention:
    """Attention between a Swin's qkv and output projections, with its mask and position index made
    once, as timm and Detectron2 do."""

    def __init__(self, qkv: Tensor, heads: int, window: int, shift: int) -> None:
        self.heads, self.window, self.shift = heads, window, shift
        H, W = qkv.shape[1:3]
        self.index = reference.relative_position_index(window, qkv.device)
        rows, columns = -(-H // window), -(-W // window)
        self.mask = None
        if shift:
            mask = reference.shift_mask(rows, columns, window, shift, qkv)
            self.mask = mask[None, :, None]  # [1, windows, 1, w², w²]

    def __call__(self, qkv: Tensor, qkv_bias: Tensor, table: Tensor, *, sdpa: bool) -> Tensor:
        B, H, W, C3 = qkv.shape
        w, heads, shift = self.window, self.heads, self.shift
        d = C3 // 3 // heads
        # Padded before the projection, as there: the bias stands for the padding's projection.
        bottom, right = -H % w, -W % w
        if bottom or right:
            padded = qkv_bias.to(qkv).expand(B, H + bottom, W + right, C3).clone()
            padded[:, :H, :W] = qkv
            qkv = padded
        rows, columns = qkv.shape[1] // w, qkv.shape[2] // w
        if shift:
            qkv = qkv.roll((-shift, -shift), dims=(1, 2))
        windows = qkv.view(B, rows, w, columns, w, C3).transpose(2, 3).reshape(-1, w * w, C3)
        q, k, v = windows.view(-1, w * w, 3, heads, d).permute(2, 0, 3, 1, 4)
        bias = table.to(qkv)[self.index].permute(2, 0, 1)[None]
        if self.mask is not None:
            bias = (bias[:, None] + self.mask).expand(B, -1, -1, -1, -1).flatten(0, 1)
        if sdpa:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            out = (q * d**-0.5 @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        out = out.transpose(1, 2).reshape(B, rows, columns, w, w, C3 // 3)
        out = out.transpose(2, 3).reshape(B, rows * w, columns * w, C3 // 3)
        if shift:
            out = out.roll((shift, shift), dims=(1, 2))
        return out[:, :H, :W].contiguous()


# Competitors --------------------------------------------------------------------------------------


def stage_map(case: Case, channels: int, device: str) -> Tensor:
    """Random values of the shape of the stage's map: [B, H, W, channels]."""
    assert case.stage is not None
    height, width = (math.ceil(n / 4 / 2**case.stage) for n in case.image)
    shape = (case.batch, height, width, channels)
    return torch.randn(shape, device=device).to(DTYPES[case.dtype])


def stage_sizes(case: Case) -> tuple[int, int]:
    """C and K of its stage."""
    config = e3va.trunk_config(case.variant)
    assert case.stage is not None
    return config.dims[case.stage], config.num_taps[case.stage]


def highway(case: Case, device: str) -> Competitors:
    """A stage between two others: the highway and the state come from one and go to the next."""
    channels, K = stage_sizes(case)
    stage = HighwayStage(K, channels, e3va.HighwayConfig()).to(device)
    nn.init.normal_(stage.V, std=0.02)
    nn.init.normal_(stage.D, std=0.2)
    norm = nn.LayerNorm(channels, device=device).requires_grad_(False)
    adapters = nn.ModuleList(Adapter(stage, k) for k in range(K))
    c = nn.Parameter(torch.zeros(channels, device=device))
    x = [stage_map(case, channels, device) for _ in range(K)]
    y, G = stage_map(case, channels, device), stage_map(case, channels, device)
    h = y.clone().requires_grad_()
    rank = stage.P.shape[-1]
    state = stage_map(case, rank, device).requires_grad_()
    gradients = [G, stage_map(case, rank, device)]

    def ours() -> Tensor:
        ride = StageRide(stage)
        y_k = y
        for x_k in x:
            y_k, _ = ride(x_k, y_k, norm)
        results = ride.arrive(h, y, y_k, state)
        torch.autograd.backward(results, gradients)
        return results[0]

    def baseline(run: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        results = run(adapters, c, norm, x, y, h, state)
        torch.autograd.backward(results, gradients)
        return results[0]

    competitors: Competitors = {OURS: ours, "eager": lambda: baseline(one_at_a_time)}
    if case.compiled:
        compiled = torch.compile(one_at_a_time, fullgraph=True)
        competitors["compile"] = lambda: baseline(compiled)
    return competitors


def window_attention(case: Case, device: str) -> Competitors:
    """A shifted and an unshifted attention, as two blocks have them."""
    config = e3va.trunk_config(case.variant)
    assert case.stage is not None
    heads, window = config.num_heads[case.stage], config.window_size
    qkv = stage_map(case, 3 * config.dims[case.stage], device)
    qkv_bias = torch.randn(qkv.shape[-1], device=device).to(qkv.dtype)
    table = torch.randn((2 * window - 1) ** 2, heads, device=device).to(qkv.dtype)
    baselines = [SwinAttention(qkv, heads, window, shift) for shift in (0, window // 2)]
    competitors: Competitors = {
        OURS: lambda: [
            ops.window_attention(qkv, qkv_bias, table, window, b.shift) for b in baselines
        ],
        "eager": lambda: [b(qkv, qkv_bias, table, sdpa=False) for b in baselines],
        "sdpa": lambda: [b(qkv, qkv_bias, table, sdpa=True) for b in baselines],
    }
    if case.compiled:
        compiled = torch.compile(SwinAttention.__call__, fullgraph=True, dynamic=False)
        competitors["compile"] = lambda: [
            compiled(b, qkv, qkv_bias, table, sdpa=False) for b in baselines
        ]
    return {name: torch.no_grad()(run) for name, run in competitors.items()}


def trunk_forward(case: Case, device: str) -> Competitors:
    from timm.models.swin_transformer import SwinTransformer

    config = e3va.trunk_config(case.variant)
    theirs = SwinTransformer(
        img_size=case.image,
        embed_dim=config.embed_dim,
        depths=config.depths,
        num_heads=config.num_heads,
        window_size=config.window_size,
        num_classes=0,
    ).eval()
    dtype = DTYPES[case.dtype]
    ours = e3va.trunks.FrozenSwin(config, dtype)
    ours.load_state_dict(convert_weights(theirs.state_dict()))
    theirs.to(device, dtype)
    ours.to(device)
    image = torch.randn(case.batch, 3, *case.image, device=device, dtype=dtype)
    competitors: Competitors = {
        OURS: lambda: ours(image),
        "timm": lambda: theirs.forward_features(image),
    }
    if case.compiled:
        compiled = torch.compile(theirs.forward_features)
        competitors["compile"] = lambda: compiled(image)
    return {name: torch.no_grad()(run) for name, run in competitors.items()}


def sublayer_epilogue(case: Case, device: str) -> Competitors:
    config = e3va.trunk_config(case.variant)
    assert case.stage is not None
    channels = config.dims[case.stage]
    stage = HighwayStage(1, channels, e3va.HighwayConfig()).to(device).requires_grad_(False)
    norm = nn.LayerNorm(channels, device=device).requires_grad_(False)
    x, y = stage_map(case, channels, device), stage_map(case, channels, device)
    arguments = (x, y, norm.weight, norm.bias, norm.eps, stage.P[0], stage.tap)
    return {
        OURS: lambda: ops.sublayer_epilogue(*arguments),
        "eager": lambda: reference.sublayer_epilogue(*arguments),
    }


def adapters(case: Case, device: str) -> Competitors:
    arguments = adapter_arguments(case, device)
    return {
        OURS: lambda: dispatch.run("adapters", arguments[0], *arguments, "full"),
        "eager": lambda: reference.adapters(*arguments),
    }


def adapters_backward(case: Case, device: str) -> Competitors:
    t, carry, *weights = adapter_arguments(case, device)
    S, _, u, _ = reference.adapters(t, carry, *weights)
    arguments = (torch.randn_like(S), torch.randn_like(carry), u, None, *weights)
    return {
        OURS: lambda: dispatch.run("adapters_backward", S, *arguments),
        "eager": lambda: reference.adapters_backward(*arguments),
    }


def adapter_arguments(case: Case, device: str) -> tuple[Any, ...]:
    """What the adapters of a stage are given."""
    channels, K = stage_sizes(case)
    stage = HighwayStage(K, channels, e3va.HighwayConfig()).to(device).requires_grad_(False)
    nn.init.normal_(stage.D, std=0.2)
    maps = [stage_map(case, stage.P.shape[-1], device) for _ in range(K + 1)]
    t, carry = torch.stack(maps[1:]).flatten(1, 3), maps[0].flatten(0, 2)
    size = tuple(maps[0].shape[1:3])
    weights = stage.D, stage.gamma, stage.g, stage.Q, stage.b, stage.U, stage.g_up
    return t, carry, *weights, size


def tap_gradient(case: Case, device: str) -> Competitors:
    """Of taps in four bits, against the same expanded."""
    channels, K = stage_sizes(case)
    codes = (compress(stage_map(case, channels, device), "int4", k) for k in range(K))
    kept, scale = map(torch.stack, zip(*codes, strict=True))
    rank = e3va.HighwayConfig().rank
    dt = torch.stack([stage_map(case, rank, device) for _ in range(K)]).flatten(1, 3)
    arguments = (kept, scale, "int4", dt, channels)
    return {
        OURS: lambda: dispatch.run("tap_gradient", dt, *arguments),
        "eager": lambda: reference.tap_gradient(*arguments),
    }


def least_bytes(case: Case) -> int | None:
    """What an op must read and write at least; None: not told.

    The epilogue reads x and y and writes y' and its norm, and t; the adapters read t and write S
    and u; their backward reads u and dS and writes S and dt; both read and write a state, or its
    gradient. The gradient of taps reads four bits a value, their scales and dt.
    """
    if case.stage is None:
        return None
    channels, K = stage_sizes(case)
    rank, size = e3va.HighwayConfig().rank, DTYPES[case.dtype].itemsize
    tokens = case.batch
    for n in case.image:
        tokens *= math.ceil(n / 4 / 2**case.stage)
    per_token = {
        "sublayer_epilogue": (4 * channels + rank) * size,
        "adapters": (3 * K + 2) * rank * size,
        "adapters_backward": (4 * K + 2) * rank * size,
        "tap_gradient": K * (-(-channels // 2) + 4 + rank * size),
    }
    return tokens * per_token[case.op] if case.op in per_token else None


OPS: dict[str, Callable[[Case, str], Competitors]] = {
    "sublayer_epilogue": sublayer_epilogue,
    "adapters": adapters,
    "adapters_backward": adapters_backward,
    "tap_gradient": tap_gradient,
    "highway": highway,
    "window_attention": window_attention,
    "trunk_forward": trunk_forward,
}
