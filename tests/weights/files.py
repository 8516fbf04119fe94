"""Files of weights as others write them."""

import torch

from e3va import E3VABackbone, load_trunk
from e3va.trunks import FrozenSwin, SwinConfig
from e3va.trunks.base import WEIGHT_HASH
from e3va.weights import trunk_hash

CONFIG = SwinConfig(16, (2, 2, 4), (1, 2, 4), window_size=4)
SIZE = (128, 192)


def official(trunk):
    """What a checkpoint of the official implementation holds: classifier and buffers too."""
    state = {name: value for name, value in trunk.state_dict().items() if name != WEIGHT_HASH}
    state |= {"norm.weight": torch.ones(64), "head.weight": torch.ones(10, 64)}
    for stage, depth in enumerate(CONFIG.depths):
        for block in range(depth):
            name = f"layers.{stage}.blocks.{block}"
            state[f"{name}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
            if block % 2:
                state[f"{name}.attn_mask"] = torch.zeros(4, 16, 16)
    return state


def mmdetection(trunk):
    """The same under the names and in the channel order of MMDetection."""
    state = {"bbox_head.fc.weight": torch.ones(3, 3), "backbone.norm0.weight": torch.ones(16)}
    for name, value in trunk.state_dict().items():
        name = name.replace("layers.", "stages.").replace(".attn.", ".attn.w_msa.")
        name = name.replace("mlp.fc1", "ffn.layers.0.0").replace("mlp.fc2", "ffn.layers.1")
        name = name.replace("patch_embed.proj.", "patch_embed.projection.")
        if "downsample" in name:
            theirs = torch.empty_like(value)
            channels = value.shape[-1] // 4
            for c in range(channels):
                for row in range(2):
                    for column in range(2):
                        ours = (2 * column + row) * channels + c
                        theirs[..., 4 * c + 2 * row + column] = value[..., ours]
            value = theirs
        if name != WEIGHT_HASH:
            state[f"backbone.{name}"] = value
    return state


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def assert_loads(path, source, dtype=torch.float32):
    trunk = FrozenSwin(CONFIG, dtype)
    load_trunk(trunk, path)
    expected = dict(source.named_parameters())
    for name, value in trunk.named_parameters():
        assert value.dtype == dtype and torch.equal(value, expected[name].to(dtype)), name
    assert trunk_hash(trunk) == trunk_hash(source)


WRITERS = {
    "microsoft": lambda t: {"model": official(t), "epoch": 3},
    "microsoft without model": official,
    "microsoft in a detector": lambda t: {"state_dict": prefixed("backbone.", official(t))},
    "mmdetection": lambda t: {"meta": {"epoch": 1}, "state_dict": mmdetection(t)},
    "detectron2": lambda t: {"model": prefixed("backbone.bottom_up.", official(t)), "iteration": 9},
    "data parallel": lambda t: {"model": prefixed("module.", official(t))},
    "ours": lambda t: prefixed("backbone.bottom_up.net.", E3VABackbone(t).state_dict()),
    "our trunk": lambda t: prefixed("trunk.", t.state_dict()),
}
