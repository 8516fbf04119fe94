"""What the LazyConfigs of Cascade Mask R-CNN share, for Detectron2's tools/lazyconfig_train_net.py:
COCO 2017, 16 images per step, 36 epochs."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data import transforms as T
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from e3va.detectron2 import BottomUp, with_weights
from e3va.detectron2.config import dtype_of
from e3va.detectron2.data.mapper import InstanceCrop
from e3va.methods import build_backbone
from e3va.optim import Rates, parameter_groups
from e3va.trunks import trunk_config

constants = model_zoo.get_config("common/data/constants.py").constants

model = model_zoo.get_config("common/models/cascade_rcnn.py").model
model.pixel_mean = constants.imagenet_rgb256_mean
model.pixel_std = constants.imagenet_rgb256_std
model.input_format = "RGB"
model.backbone.bottom_up = L(BottomUp)(
    net=L(with_weights)(
        net=L(build_backbone)(
            method="e3va",
            trunk=L(trunk_config)(variant="swin_b", window_size=7),
            # That tool's mixed precision is in float16.
            dtype=L(dtype_of)(key="dtype", name="float16"),
        ),
        weights="",
    ),
)
model.backbone.in_features = ["p0", "p1", "p2", "p3"]
model.proposal_generator.post_nms_topk = (2000, 1000)

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.augmentations = [
    L(T.RandomApply)(
        tfm_or_aug=L(T.AugmentationList)(
            augs=[
                L(T.ResizeShortestEdge)(short_edge_length=(400, 500, 600), sample_style="choice"),
                L(InstanceCrop)(crop_type="absolute_range", crop_size=(384, 600)),
            ]
        ),
        prob=0.5,
    ),
    L(T.ResizeShortestEdge)(
        short_edge_length=(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        max_size=1333,
        sample_style="choice",
    ),
    L(T.RandomFlip)(horizontal=True),
]

optimizer = model_zoo.get_config("common/optim.py").AdamW
optimizer.lr = 1e-4
optimizer.weight_decay = 0.05
optimizer.params = L(parameter_groups)(
    rates=L(Rates)(lr="${...lr}", weight_decay="${...weight_decay}"),
)

train = model_zoo.get_config("common/train.py").train
train.amp.enabled = True
train.max_iter = 270000
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[202500, 247500], num_updates=train.max_iter
    ),
    warmup_length=500 / train.max_iter,
    warmup_factor=0.001,
)
