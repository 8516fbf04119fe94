"""Detectron2's checkpoints, read without executing pickles and written without the frozen trunk."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from e3va.checkpoint import find_trunk, frozen_hash, own_state
from e3va.files import atomic_path
from e3va.weights import read_weights, trunk_hash
from e3va.weights.reading import read_content

_FORMER = re.compile(r"^(backbone\.(?:bottom_up\.)?)swin\.")
"""The beginning of names in files of before: what follows ``net.`` now."""

PARTIAL = ".partial"
"""Ends the name of a checkpoint while it is being written."""


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
        trunk = find_trunk(self.model)[1]
        self._source = trunk_source
        self._loaded_hash = trunk_hash(trunk) if trunk else None
        self._frozen_hash = frozen_hash(self.model)

    def save(self, name: str, **kwargs: Any) -> None:
        """As ``DetectionCheckpointer``'s; with the trunk if it is no longer its source's. A file of
        the same name is replaced as a whole or not at all."""
        super().save(name + PARTIAL, **{**kwargs, **self._without_trunk()})

    def save_model(self, name: str, **more: Any) -> None:
        """Write the model alone, without what a training goes on from, and ``more``; it does not
        become the last checkpoint."""
        content = {"model": self.model.state_dict(), **self._without_trunk(), **more}
        with atomic_path(Path(self.save_dir) / f"{name}.pth") as temporary:
            torch.save(content, temporary)

    def _without_trunk(self) -> dict[str, Any]:
        """What stands for the model's state where the trunk's source brings the rest again."""
        trunk = self._trunk_as_loaded()
        if not (self._source and self._frozen_hash and trunk):
            return {}
        about = {"hash": trunk, "source": self._source}
        return {"model": own_state(self.model), "trunk": about}

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name a file that has been written, and only now is whole, and make it the last one."""
        name = last_filename_basename.replace(PARTIAL, "")
        folder = Path(self.save_dir)
        os.replace(folder / last_filename_basename, folder / name)
        with atomic_path(folder / "last_checkpoint") as temporary:
            temporary.write_text(name)

    def _trunk_as_loaded(self) -> str | None:
        """The hash of the trunk as it was when this was made; None if its frozen part has since
        become another."""
        same = frozen_hash(self.model) == self._frozen_hash
        return self._loaded_hash if same else None

    def _load_file(self, filename: str) -> dict[str, Any]:
        if not filename.endswith(".pth"):
            return {"model": _renamed(read_weights(filename))}
        loaded = super()._load_file(filename)
        named = {key: _renamed(loaded[key]) for key in ("model", "ema") if key in loaded}
        for group in loaded.get("trainer", {}).get("trained", {}).get("groups", ()):
            group[:] = [[_name(name), shape] for name, shape in group]
        return {**loaded, **named}

    def _torch_load(self, f: str) -> dict[str, Any]:
        return read_content(Path(f))

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        trunk = checkpoint.get("trunk")
        if not isinstance(trunk, dict):
            return super()._load_model(checkpoint)
        here = self._trunk_as_loaded()
        if here != trunk["hash"]:
            raise ValueError(
                f"the checkpoint was trained over the frozen trunk {trunk['hash']}, but the "
                f"model's is {here or 'another'}: set MODEL.TRUNK.WEIGHTS to what it was trained "
                f"with, {trunk['source']}"
            )
        incompatible = super()._load_model(checkpoint)
        prefix = find_trunk(self.model)[0]
        incompatible.missing_keys[:] = [
            name for name in incompatible.missing_keys if not name.startswith(prefix)
        ]
        return incompatible


def _renamed(state: Mapping[str, Any]) -> dict[str, Any]:
    return {_name(name): value for name, value in state.items()}


def _name(name: str) -> str:
    return _FORMER.sub(r"\1net.", name)


class CompleteCheckpointer(SafeCheckpointer):
    """Refuses what others skip with a warning: a head left random would predict nonsense."""

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        incompatible = super()._load_model(checkpoint)
        missing, wrong = incompatible.missing_keys, incompatible.incorrect_shapes
        if wrong:
            name, theirs, ours = wrong[0]
            what = f"{len(wrong)} tensors have other shapes, such as {name}: {theirs}, not {ours}"
        elif missing:
            what = f"{len(missing)} tensors are missing, such as {missing[0]}"
        else:
            return incompatible
        raise ValueError(
            f"the weights are of another model: {what}. Give the config.yaml that training wrote "
            "beside them: it knows the method and the number of classes"
        )
