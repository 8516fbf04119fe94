"""Detectron2's checkpoints, read without executing pickles and written without the frozen trunk."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from e3va.trunk import Swin
from e3va.weights import read_weights, trunk_hash


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that reading a file never runs code from it, and that the
    frozen weights of the trunk are not written where ``trunk_source`` brings them again.

    Such a file names the trunk by its hash and source instead (under "trunk"), and is loaded over
    no other. Full files are read as ever.

    Args:
        model: the detector, its trunk's weights loaded from ``trunk_source``.
        save_dir, checkpointables: as for ``DetectionCheckpointer``.
        trunk_source: the file or URL of the trunk's weights (default: none; they are written).
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        trunk_source: str = "",
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self._source = trunk_source
        known = trunk_source and frozen_names(self.model)
        self._source_hash = frozen_hash(self.model) if known else None

    def save(self, name: str, **kwargs: Any) -> None:
        """As ``DetectionCheckpointer``'s; with the trunk if it is no longer its source's."""
        if self._source_hash and frozen_hash(self.model) == self._source_hash:
            frozen = frozen_names(self.model)
            state = self.model.state_dict()
            kwargs["model"] = {k: v for k, v in state.items() if k not in frozen}
            kwargs["trunk"] = {"hash": self._source_hash, "source": self._source}
        super().save(name, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pth"):
            return super()._load_file(filename)
        return {"model": read_weights(filename)}

    def _torch_load(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=True)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        trunk = checkpoint.get("trunk")
        if not isinstance(trunk, dict):
            return super()._load_model(checkpoint)
        here = frozen_hash(self.model)
        if here != trunk["hash"]:
            raise ValueError(
                f"the checkpoint was trained over the frozen trunk {trunk['hash']}, but the "
                f"model's is {here}: set MODEL.E3VA.WEIGHTS to what it was trained with, "
                f"{trunk['source']}"
            )
        incompatible = super()._load_model(checkpoint)
        prefix = _trunk(self.model)[0]
        incompatible.missing_keys[:] = [
            name for name in incompatible.missing_keys if not name.startswith(prefix)
        ]
        return incompatible


def frozen_names(model: nn.Module) -> set[str]:
    """Names of the tensors of the model's trunk that training leaves as they are."""
    prefix, trunk = _trunk(model)
    return {prefix + name for name in _frozen(trunk)} if trunk else set()


def frozen_hash(model: nn.Module) -> str | None:
    """The hash of the trunk's frozen weights, or of all if none is frozen (hexadecimal SHA-256, see
    :func:`e3va.weights.trunk_hash`); None if the model has no trunk."""
    trunk = _trunk(model)[1]
    return trunk_hash(trunk, _frozen(trunk) or None) if trunk else None


def _trunk(model: nn.Module) -> tuple[str, Swin | None]:
    """The model's trunk, and what the names of its tensors begin with."""
    for name, module in model.named_modules():
        if isinstance(module, Swin):
            return f"{name}." if name else "", module
    return "", None


def _frozen(trunk: Swin) -> set[str]:
    trained = {name for name, p in trunk.named_parameters() if p.requires_grad}
    return trunk.state_dict().keys() - trained
