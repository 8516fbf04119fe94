"""What all formats of one's own data share: their rows in a table, and Detectron2's catalogs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetFormat:
    """A format that one's own data may have.

    Attributes:
        section: its section of ``cfg.DATASETS``.
        defaults: the keys of the section and their defaults.
        given_by: those of them that name data; all empty: there are none in this format.
        register: registers the data that a config names, and makes the config use them.
        evaluators: by evaluator type, what scores such a data set of the given name. Detectron2's
            own data sets of a type are scored alike.
    """

    section: str
    defaults: Mapping[str, Any]
    given_by: tuple[str, ...]
    register: Callable[[CfgNode], None]
    evaluators: Mapping[str, Callable[[CfgNode, str], DatasetEvaluator]]

    def is_given(self, cfg: CfgNode) -> bool:
        """Whether ``cfg`` names data of this format."""
        return any(cfg.DATASETS[self.section][key] for key in self.given_by)


def register(
    cfg: CfgNode,
    split: str,
    name: str,
    load: Callable[[], list[dict[str, Any]]],
    /,
    **metadata: Any,
) -> None:
    """Register what ``cfg`` trains on ("TRAIN") or is evaluated on ("TEST"), and what is known of
    it, in place of what an earlier config of this process called so."""
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
    cfg.DATASETS[split] = (name,)


def leave_out(cfg: CfgNode, split: str, key: str) -> None:
    """Let ``cfg`` have no such split, for ``key`` is empty."""
    use = {"TRAIN": "trained on", "TEST": "evaluated"}[split]
    logger.warning("no %s: nothing is %s", key, use)
    cfg.DATASETS[split] = ()


def set_classes(cfg: CfgNode, classes: list[str], source: object, *heads: CfgNode) -> None:
    """Make ``heads``, sections of ``cfg``, tell ``classes`` apart, which ``source`` names."""
    for head in heads:
        head.NUM_CLASSES = len(classes)
    cfg.DATASETS.CLASSES = classes
    logger.info("%d classes, from %s: %s", len(classes), source, ", ".join(classes))


def expand_path(cfg: CfgNode, section: str, key: str) -> str:
    """The path that ``cfg.DATASETS[section][key]`` names, with "~" and "$VARIABLE" expanded.

    Raises:
        ValueError: such a variable is not set.
    """
    path = os.path.expanduser(os.path.expandvars(cfg.DATASETS[section][key]))
    if "$" in path:
        raise ValueError(
            f"DATASETS.{section}.{key} is {path!r}, but that environment variable is not set: "
            f"set it, or give the path as DATASETS.{section}.{key}"
        )
    return path
