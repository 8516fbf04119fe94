"""Detectron2's checkpoints, read without executing pickles."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer

from e3va.weights import read_weights


class SafeCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, except that reading a file never runs code from it."""

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pth"):
            return super()._load_file(filename)
        return {"model": read_weights(filename)}

    def _torch_load(self, f: str) -> dict[str, Any]:
        return torch.load(f, map_location="cpu", weights_only=True)
