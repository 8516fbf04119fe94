#!/usr/bin/env python3
"""Train and evaluate with Detectron2.

    python train_net.py --config-file detectron2_configs/coco/mask_rcnn_e3va_swin_b_1x.yaml \\
        --num-gpus 1 OUTPUT_DIR output/swin_b

--resume continues, --eval-only evaluates MODEL.WEIGHTS (with --resume: the last checkpoint), and
KEY VALUE pairs at the end override the config.
"""

# First, as it says how to get Detectron2 where it is missing.
from e3va.detectron2.train import main  # isort: split

from detectron2.engine import default_argument_parser, launch

if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
