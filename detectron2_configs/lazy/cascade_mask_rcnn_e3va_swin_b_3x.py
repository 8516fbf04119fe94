"""Cascade Mask R-CNN, Swin-B, 36 epochs of COCO, for Detectron2's tools/lazyconfig_train_net.py."""

from .Base_cascade_mask_rcnn_e3va import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    train,
)

net = model.backbone.bottom_up.net
net.net.trunk.variant = "swin_b"
net.weights = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/"
    "swin_base_patch4_window7_224_22k.pth"
)
train.output_dir = "output/coco/cascade_mask_rcnn_e3va_swin_b_3x_lazy"
