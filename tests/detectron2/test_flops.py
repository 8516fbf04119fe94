"""The flops of our ops."""

import pytest
import torch

pytest.importorskip("detectron2", reason="Detectron2 is not installed: its integration is untested")

from fvcore.nn import FlopCountAnalysis

from e3va import E3VABackbone, HighwayConfig, trunk_config
from e3va.detectron2.flops import HANDLES
from e3va.trunks import FrozenSwin


def test_flops_of_our_ops():
    """Those of torchvision's Swin, where attention is made of plain products, and the adapters'."""
    swin_t = pytest.importorskip("torchvision.models").swin_t(weights=None).features.eval()
    config, image = trunk_config("swin_t"), torch.randn(1, 3, 224, 224)
    trunk = FrozenSwin(config)
    expected = FlopCountAnalysis(swin_t, image).total()

    def flops(model):
        return FlopCountAnalysis(model.eval(), image).set_op_handle(**HANDLES)

    assert flops(trunk).total() == expected
    adapters = 0
    highway = HighwayConfig(tap="output")  # the norm after a stage's last sub-layer is one more
    for s, (K, C) in enumerate(zip(config.num_taps, config.dims, strict=True)):
        tokens, r, m = (56 // 2**s) ** 2, highway.rank, highway.hidden(C)
        adapters += K * tokens * (2 * (C * r + r * m) + 9 * r)
    ours = flops(E3VABackbone(trunk, highway)).by_operator()
    alone = flops(trunk).by_operator()
    assert ours["highway"] + ours["sublayer_epilogue"] - alone["sublayer_epilogue"] == adapters
