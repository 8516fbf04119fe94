"""How many kernels a training step launches on a GPU: the time of a small one is mostly theirs."""

from collections import Counter
from dataclasses import replace

import torch
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import e3va
from e3va import E3VABackbone, trunk_config
from e3va.ops.backends.registry import IMPLEMENTATIONS
from e3va.ops.library import FUNCTIONS
from e3va.trunks import FrozenSwin

CEILING = 449

FREE = {"empty", "new_empty", "empty_like", "empty_strided", "promote_types"}
"""Beside these, what returns a view of an argument, and does not write to it, launches nothing."""


def of_window_attention(qkv, qkv_bias, position_bias, window, shift):
    casts = qkv_bias.dtype != qkv.dtype, position_bias.dtype != qkv.dtype
    return 1 + sum(casts)


LAUNCHES = {
    "window_attention": of_window_attention,
    "sublayer_epilogue": lambda *arguments: 1,
    # One for each adapter where there is a state, which begins with two; and the folded weights.
    "adapters": lambda t, *rest: len(t) + 2 + 1,
    # One more than adapters, the beginning of the state, the folded weights; the sums of parts, of
    # D's gradient and of others, and what folds the latter. Large maps, whose parts outgrow a
    # cache, take more sums: one for every few adapters.
    "adapters_backward": lambda dS, dcarry, u, *rest: len(u) + 1 + 1 + 1 + 2 + 1,
    "tap_gradient": lambda *arguments: 2,  # and a sum
    "stage_exit_backward": lambda *arguments: 3,  # and two sums
}
"""Of the kernels of each op, as ``e3va.kernels`` and ``csrc/cuda`` launch them."""


class Launches(TorchDispatchMode):
    """Counts operators that compute. Those of e3va count as what runs inside of them."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        if function.namespace == "e3va":
            name = function._schema.name.removeprefix("e3va::")
            with self:
                return FUNCTIONS[name](*arguments, **(named or {}))
        result = function(*arguments, **(named or {}))
        name = function.overloadpacket.__name__
        given = {v.untyped_storage()._cdata for v in tree_leaves(arguments) if is_tensor(v)}
        made = {v.untyped_storage()._cdata for v in tree_leaves(result) if is_tensor(v)}
        if name not in FREE and (function._schema.is_mutable or not made <= given):
            self.calls[name] += 1
        return result


def test_a_step_of_swin_b_launches_few_kernels(monkeypatch):
    launches = Launches()

    def counted(op, run):
        def kernels(*arguments):
            launches.calls[op] += LAUNCHES[op](*arguments)
            with torch.utils._python_dispatch._disable_current_modes():
                return run(*arguments)

        return kernels

    for op in LAUNCHES:
        backend = IMPLEMENTATIONS[op]["reference"]
        monkeypatch.setitem(
            IMPLEMENTATIONS[op], "reference", backend._replace(run=counted(op, backend.run))
        )
    # As many blocks, and narrow: the count does not depend on the width.
    config = replace(trunk_config("swin_b"), embed_dim=16, num_heads=(1, 2, 4, 8), window_size=2)
    backbone = E3VABackbone(FrozenSwin(config, torch.bfloat16))
    image = torch.randn(1, 3, 32, 32)
    with e3va.backend("reference"), launches:
        with torch.autocast("cpu", torch.bfloat16):
            maps = list(backbone(image).values())
        torch.autograd.backward(maps, [torch.ones_like(p) for p in maps])
    assert launches.calls.total() <= CEILING, launches.calls.most_common()
