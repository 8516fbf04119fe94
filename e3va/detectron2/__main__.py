"""Run one of Detectron2's own tools, unchanged, on E³VA's YAML configs.

    python -m e3va.detectron2 PATH/TO/detectron2/tools/plain_train_net.py --config-file …

The tools know neither E³VA's config keys and backbones nor the flops of its ops, which this adds
before it runs them.
They see the data sets that Detectron2 registers, not those of DATASETS.COCO_JSON and the like.
LazyConfigs need no such help.
"""

from __future__ import annotations

import os
import runpy
import sys

from detectron2.config.defaults import _C
from fvcore.nn.flop_count import _DEFAULT_SUPPORTED_OPS

from e3va.detectron2 import add_e3va_config
from e3va.detectron2.flops import HANDLES


def main(arguments: list[str]) -> None:
    """Run the tool ``arguments[0]`` with the rest of them.

    Raises:
        SystemExit: there is no such file.
    """
    if not arguments or not os.path.isfile(arguments[0]):
        raise SystemExit("usage: python -m e3va.detectron2 TOOL.py [ARGUMENT …]")
    add_e3va_config(_C)
    _DEFAULT_SUPPORTED_OPS.update(HANDLES)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
