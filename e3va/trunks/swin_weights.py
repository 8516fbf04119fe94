"""How libraries publish a Swin's weights, and their names translated to ours, which are the
official implementation's.

A file is told by the name of its patch embedding, under whatever prefix (``backbone.``, ``swin.``,
``backbone.bottom_up.`` …); what does not belong to the trunk (heads, necks, output norms, index
buffers) is ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from e3va.trunks.base import WEIGHT_HASH

State = dict[str, Tensor]


class _Format(NamedTuple):
    """How a library names the trunk: ``rules`` are applied in turn to what follows the prefix."""

    name: str
    patch_embed: str
    rules: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


_FORMATS = (
    # Also timm, Detectron2 and our own checkpoints.
    _Format("Microsoft", "patch_embed.proj.weight", ()),
    _Format(
        "MMDetection",
        "patch_embed.projection.weight",
        (
            (r"^patch_embed\.projection\.", r"patch_embed.proj."),
            (r"^stages\.", r"layers."),
            (r"\.attn\.w_msa\.", r".attn."),
            (r"\.ffn\.layers\.0\.0\.", r".mlp.fc1."),
            (r"\.ffn\.layers\.1\.", r".mlp.fc2."),
        ),
    ),
    _Format(
        "torchvision",
        "features.0.0.weight",
        (
            (r"^features\.0\.0\.", r"patch_embed.proj."),
            (r"^features\.0\.2\.", r"patch_embed.norm."),
            # Stages and the mergings between them share one count: 1, 3, … and 2, 4, …
            (
                r"^features\.(\d+)\.(norm|reduction)\.",
                lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample.{m[2]}.",
            ),
            (r"^features\.(\d+)\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}."),
            (r"\.mlp\.0\.", r".mlp.fc1."),
            (r"\.mlp\.3\.", r".mlp.fc2."),
        ),
    ),
    _Format(
        "Hugging Face",
        "embeddings.patch_embeddings.projection.weight",
        (
            (r"^embeddings\.patch_embeddings\.projection\.", r"patch_embed.proj."),
            (r"^embeddings\.norm\.", r"patch_embed.norm."),
            (r"^encoder\.", r""),
            (r"\.layernorm_before\.", r".norm1."),
            (r"\.layernorm_after\.", r".norm2."),
            (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
            (r"\.attention\.output\.dense\.", r".attn.proj."),
            (r"\.attention\.self\.relative_", r".attn.relative_"),
            (r"\.intermediate\.dense\.", r".mlp.fc1."),
            (r"\.output\.dense\.", r".mlp.fc2."),
            # As transformers 5 names its modules; the files on the Hub keep the names above.
            (r"\.attention\.q_proj\.", r".attn.query."),
            (r"\.attention\.k_proj\.", r".attn.key."),
            (r"\.attention\.v_proj\.", r".attn.value."),
            (r"\.attention\.o_proj\.", r".attn.proj."),
            (r"\.attention\.relative_position_bias\.relative_", r".attn.relative_"),
        ),
    ),
)

_TRUNK = re.compile(r"(patch_embed|layers\.\d+\.(blocks\.\d+|downsample))\.")
_BUFFER = re.compile(r"(^|\.)(attn_mask|relative_position_index)$")

MARKS = tuple(known.patch_embed for known in _FORMATS)


def translate(state: Mapping[str, Tensor]) -> State | None:
    """The trunk in ``state``, under our names; everything else is left out. None if no patch
    embedding of a Swin is among the names.

    Knows the names of Microsoft, MMDetection, timm, torchvision, Hugging Face, Detectron2 and of
    our own checkpoints, under any prefix.
    """
    found = [
        (known, name.removesuffix(known.patch_embed))
        for known in _FORMATS
        for name in state
        if name == known.patch_embed or name.endswith("." + known.patch_embed)
    ]
    if not found:
        return None
    known, prefix = min(found, key=lambda item: len(item[1]))
    trunk: State = {}
    for name, value in state.items():
        if not name.startswith(prefix):
            continue
        name = name.removeprefix(prefix)
        for pattern, replacement in known.rules:
            name = re.sub(pattern, replacement, name)
        if name == WEIGHT_HASH or (_TRUNK.match(name) and not _BUFFER.search(name)):
            trunk[name] = value
    if known.name == "MMDetection":
        trunk = {name: _from_unfold(name, value) for name, value in trunk.items()}
    return _stack_qkv(_merging_after_its_stage(trunk))


def _from_unfold(name: str, value: Tensor) -> Tensor:
    """MMDetection merges patches by nn.Unfold: channels (c, row, column), ours (column, row, c)."""
    if ".downsample." not in name or value.shape[-1] % 4:
        return value
    return value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)


def _merging_after_its_stage(trunk: State) -> State:
    """timm merges patches at the beginning of a stage; everyone else at the end of the one before.

    Only then has the first stage none.
    """
    merging = re.compile(r"^layers\.(\d+)\.downsample\.")
    if any(name.startswith("layers.0.downsample.") for name in trunk):
        return trunk
    return {
        merging.sub(lambda m: f"layers.{int(m[1]) - 1}.downsample.", name): value
        for name, value in trunk.items()
    }


def _stack_qkv(trunk: State) -> State:
    stacked: State = {}
    for name, value in trunk.items():
        parts = [name.replace(".attn.query.", f".attn.{p}.") for p in ("query", "key", "value")]
        if ".attn.query." in name and all(part in trunk for part in parts):
            stacked[name.replace(".query.", ".qkv.")] = torch.cat([trunk[part] for part in parts])
        elif not re.search(r"\.attn\.(key|value)\.", name):
            stacked[name] = value
    return stacked


def architecture_of(
    state: Mapping[str, Tensor],
) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """Channels, depths, heads and window that the shapes of a Swin's weights, under our names,
    speak of."""
    depths: dict[int, int] = {}
    heads: dict[int, int] = {}
    window = 0
    for name, value in state.items():
        if match := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
            stage, block = int(match[1]), int(match[2])
            depths[stage] = max(depths.get(stage, 0), block + 1)
            if name.endswith("relative_position_bias_table") and value.dim() == 2:
                heads[stage] = value.shape[1]
                window = (math.isqrt(value.shape[0]) + 1) // 2
    return (
        state["patch_embed.proj.weight"].shape[0],
        tuple(depths[s] for s in sorted(depths)),
        tuple(heads[s] for s in sorted(heads)),
        window,
    )
