"""Pretrained trunks: files read without executing pickles, timm's by name, and their names
translated to ours.

Ours are the official implementation's. A file is told by the name of its patch embedding, under
whatever prefix (``backbone.``, ``swin.``, ``backbone.bottom_up.`` …); what does not belong to the
trunk (heads, necks, output norms, index buffers) is ignored.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from e3va.config import SWIN_VARIANTS, SwinConfig
from e3va.files import atomic_path
from e3va.trunk import WEIGHT_HASH, FrozenSwin, Swin

State = dict[str, Tensor]

TIMM = "timm:"
"""What the name of a model of timm's begins with, where it stands for a file."""


# --- Reading -----------------------------------------------------------------------------------


def read_weights(path: str | os.PathLike[str]) -> State:
    """The tensors of a checkpoint, on the CPU, under the names they have in it.

    Reads ``.safetensors``, PyTorch's ``.pth``, ``.pt`` and ``.bin``, and Detectron2's ``.pkl``.
    Dictionaries around the weights ("model", "state_dict") and a common prefix ``module.`` are
    taken off. No file can run code: only tensors, arrays and plain containers are built.

    ``timm:NAME`` reads the pretrained weights that timm knows by NAME, which it downloads once.

    Raises:
        FileNotFoundError: no such file.
        ImportError: timm is wanted and not installed.
        ValueError: the file has another suffix, is damaged, or holds more than plain weights; timm
            does not know the name or cannot download it.
    """
    if str(path).startswith(TIMM):
        return _read_timm(str(path))
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix not in _READERS:
        raise ValueError(
            f"cannot read {path}: weights are files ending in {', '.join(_READERS)}, "
            f"not {path.suffix!r}"
        )
    try:
        content = _READERS[path.suffix](path)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds objects other than weights, which are not loaded because "
            f"they could run code. If you trust it, save its tensors again, alone: {error}"
        ) from error
    except _DAMAGED as error:
        raise ValueError(f"{path} is damaged or no {path.suffix} file: {error}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of weights")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _read_timm(source: str) -> State:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ImportError(f"{source} needs timm: pip install timm") from error
    try:
        return timm.create_model(source.removeprefix(TIMM), pretrained=True).state_dict()
    except Exception as error:  # of timm, of the Hugging Face Hub, or of any way to reach it
        raise ValueError(
            f"timm has no pretrained weights for {source}, or cannot download them; the path of a "
            f"file that is here needs no network: {error}"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not PyTorch's whole message, which recommends to load the file unsafely.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"refused the global {refused[1]}" if refused else "no plain PyTorch checkpoint"
        raise pickle.UnpicklingError(reason) from error


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        return _as_tensors(_ArrayUnpickler(file, encoding="latin1").load())


def _as_tensors(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_tensors(item) for key, item in value.items()}
    if isinstance(value, _Array):
        return torch.from_numpy(value.array)
    return value


class _Dtype:
    """Stands for a numpy.dtype in a pickle: of its state, only the byte order is believed."""

    def __init__(self, code: str, *_: bool) -> None:
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for a numpy.ndarray in a pickle, and for what builds one: made of its bytes alone.

    numpy's own functions trust a pickle: with a dtype that lies about itself they crash.
    """

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self._fill(data, dtype, shape, "F" if fortran else "C")

    @classmethod
    def reconstruct(cls, *_: Any) -> _Array:
        return cls()

    @classmethod
    def scalar(cls, dtype: _Dtype, data: bytes | str) -> _Array:
        return cls()._fill(data, dtype, (), "C")

    @classmethod
    def frombuffer(
        cls,
        data: bytes,
        dtype: _Dtype,
        shape: tuple[int, ...],
        order: Literal["C", "F", "K"],
        axes: tuple[int, ...] | None = None,
    ) -> _Array:
        built = cls()._fill(data, dtype, shape, "C" if order == "K" else order)
        if axes is not None:
            built.array = built.array.transpose(axes)
        return built

    def _fill(
        self, data: bytes | str, dtype: _Dtype, shape: tuple[int, ...], order: Literal["C", "F"]
    ) -> _Array:
        if dtype.dtype.kind not in "fiub":
            raise pickle.UnpicklingError(f"refused an array of {dtype.dtype}")
        if isinstance(data, str):  # a pickle of Python 2
            data = _encode(data)
        flat = np.frombuffer(data, dtype.dtype).astype(dtype.dtype.newbyteorder("="))
        self.array = flat.reshape(shape, order=order)
        return self


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How pickles of protocol 2 and below write bytes."""
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds arrays of numbers and plain containers, and refuses to look up anything else."""

    _KNOWN: Mapping[str, Any] = {
        "collections.OrderedDict": collections.OrderedDict,
        "_codecs.encode": _encode,
        "numpy.dtype": _Dtype,
        "numpy.ndarray": _Array,
        **{
            f"numpy.{core}.{name}": build
            for core in ("core", "_core")
            for name, build in (
                ("multiarray._reconstruct", _Array.reconstruct),
                ("multiarray.scalar", _Array.scalar),
                ("numeric._frombuffer", _Array.frombuffer),
            )
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._KNOWN:
            raise pickle.UnpicklingError(f"refused the global {module}.{name}")
        return self._KNOWN[f"{module}.{name}"]


_READERS: dict[str, Callable[[Path], Any]] = {
    ".safetensors": safetensors.torch.load_file,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".pkl": _read_pickle,
}

# What the readers raise on truncated or foreign bytes: a pickle of garbage can fail anyhow.
_DAMAGED = (
    SafetensorError,
    RuntimeError,
    EOFError,
    OverflowError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
)


# --- Translating -------------------------------------------------------------------------------


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


def convert_weights(state: Mapping[str, Tensor]) -> State:
    """The trunk in ``state``, under our names; everything else is left out.

    Knows the names of Microsoft, MMDetection, timm, torchvision, Hugging Face, Detectron2 and of
    our own checkpoints, under any prefix.

    Raises:
        ValueError: no patch embedding of a Swin is among the names.
    """
    known, prefix = _recognise(state)
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


def _recognise(state: Mapping[str, Tensor]) -> tuple[_Format, str]:
    found = [
        (known, name.removesuffix(known.patch_embed))
        for known in _FORMATS
        for name in state
        if name == known.patch_embed or name.endswith("." + known.patch_embed)
    ]
    if not found:
        names = ", ".join(list(state)[:5]) or "none at all"
        wanted = ", ".join(known.patch_embed for known in _FORMATS)
        raise ValueError(f"holds no Swin: no name ends in one of {wanted}; its first are {names}")
    return min(found, key=lambda item: len(item[1]))


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


# --- Loading and saving ------------------------------------------------------------------------


def load_trunk(trunk: Swin, path: str | os.PathLike[str]) -> None:
    """Load pretrained weights into ``trunk``, in the dtype that it stores them in.

    Args:
        trunk: the Swin; unchanged if this fails.
        path: a file that :func:`read_weights` reads, named as :func:`convert_weights` knows, or
            ``timm:NAME``.

    Raises:
        FileNotFoundError: no such file.
        ImportError: timm is wanted and not installed.
        ValueError: the file is damaged, holds no Swin, or another one than ``trunk``; timm cannot
            bring it.
    """
    _load(trunk, _read_trunk(path), path)


def _read_trunk(path: str | os.PathLike[str]) -> State:
    content = read_weights(path)
    try:
        return convert_weights(content)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None


def _load(trunk: Swin, state: State, path: str | os.PathLike[str]) -> None:
    weights = {name: value.float() for name, value in state.items() if name != WEIGHT_HASH}
    own = trunk.state_dict()
    if WEIGHT_HASH in own:
        weights[WEIGHT_HASH] = _hash(state)
    if problems := _compare(weights, own):
        raise ValueError(
            f"{path} does not fit the trunk: it looks like {_describe(weights)}, the trunk is "
            f"{_describe(own)}. {'; '.join(problems)}"
        )
    trunk.load_state_dict(weights)


def open_trunk(path: str | os.PathLike[str]) -> FrozenSwin:
    """The frozen trunk that a file of pretrained weights holds, whichever variant it is.

    Args:
        path: a file that :func:`read_weights` reads, named as :func:`convert_weights` knows, or
            ``timm:NAME``.

    Raises:
        FileNotFoundError: no such file.
        ImportError: timm is wanted and not installed.
        ValueError: the file is damaged, or holds no Swin; timm cannot bring it.
    """
    state = _read_trunk(path)
    try:
        trunk = FrozenSwin(swin_config_of(state))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    _load(trunk, state, path)
    return trunk


def save_trunk(
    trunk: Swin,
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write the trunk's weights as safetensors, under the official names.

    The file's header has the fields of the trunk's :class:`SwinConfig` as JSON, under "config".

    Args:
        trunk: the Swin.
        path: the file; replaced as a whole or not at all.
        dtype: what to store the weights in (default: as they are).
        metadata: further strings to keep in the file's header (default: none).

    Raises:
        ValueError: ``path`` does not end in ``.safetensors``.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"a trunk is saved as .safetensors, not as {path}")
    state = {
        name: (value.to(dtype) if value.is_floating_point() else value).cpu().contiguous()
        for name, value in trunk.state_dict().items()
        if value.is_floating_point() or value.any()  # a hash that is not known says nothing
    }
    config = json.dumps(dataclasses.asdict(trunk.config))
    header = {"format": "pt", "config": config, **(metadata or {})}
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(state, temporary, header)


def trunk_hash(trunk: Swin, names: Collection[str] | None = None) -> str:
    """SHA-256, in hexadecimal, of the trunk's weights as their file had them.

    So it does not depend on the dtype that a frozen trunk stores them in. A trunk that was not
    loaded by :func:`load_trunk` is named by the weights it has.

    Args:
        trunk: the Swin.
        names: those of its tensors that count (default: all).
    """
    state = trunk.state_dict()
    if names is not None:
        state = {name: state[name] for name in names}
    return bytes(_hash(state).tolist()).hex()


def _hash(state: Mapping[str, Tensor]) -> Tensor:
    """The hash that ``state`` carries, else that of its weights in float32: uint8 [32]."""
    known = state.get(WEIGHT_HASH)
    if known is not None and known.any():
        return known
    digest = hashlib.sha256()
    for name in sorted(state.keys() - {WEIGHT_HASH}):
        value = state[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {list(value.shape)}\n".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _compare(state: State, own: State) -> list[str]:
    """What of ``state`` does not fit ``own``, in words."""
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name} ({list(state[name].shape)} instead of {list(own[name].shape)})"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    return [
        f"{len(names)} {problem}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
        for problem, names in problems.items()
        if names
    ]


def swin_config_of(state: Mapping[str, Tensor]) -> SwinConfig:
    """The architecture that the shapes of a trunk's weights, under our names, speak of.

    Raises:
        ValueError: they are of no Swin.
    """
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
    return SwinConfig(
        state["patch_embed.proj.weight"].shape[0],
        tuple(depths[s] for s in sorted(depths)),
        tuple(heads[s] for s in sorted(heads)),
        window,
    )


def _describe(state: State) -> str:
    """The variant and window that the shapes of ``state`` speak of."""
    try:
        shapes = swin_config_of(state)
    except ValueError:
        channels = state["patch_embed.proj.weight"].shape[0]
        return f"no Swin that we know ({channels} channels)"
    window = shapes.window_size
    for variant, config in SWIN_VARIANTS.items():
        architecture = (config.embed_dim, config.depths, config.num_heads)
        if architecture == (shapes.embed_dim, shapes.depths, shapes.num_heads):
            return f"{variant} with windows of {window}"
    return (
        f"a Swin of {shapes.embed_dim} channels, depths {shapes.depths}, heads {shapes.num_heads} "
        f"and windows of {window}"
    )
