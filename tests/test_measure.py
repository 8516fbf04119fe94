import torch
from torch import nn

from e3va import E3VABackbone, FrozenSwin, HighwayConfig, SwinConfig, ops
from e3va.measure import LiveBytes, SavedBytes, saved_bytes, trainable_parameters

MIB = 2**18  # float32 values in a MiB


def test_live_bytes_of_known_code():
    before = torch.zeros(MIB)
    with LiveBytes() as memory:
        a = before + 1
        assert memory.live == 2**20
        b = a.view(2, -1) * 2  # a view is no storage of its own
        assert memory.live == memory.peak == 2 * 2**20
        del b
        assert memory.live == 2**20
        a.add_(1)
        c = a + 1
    assert (memory.live, memory.peak) == (2 * 2**20, 2 * 2**20)
    del a, c
    assert memory.live == 0


def test_live_bytes_include_the_backward():
    x = torch.randn(MIB, requires_grad=True)
    with LiveBytes() as memory:
        (x.exp() * 2).sum().backward()
    assert memory.peak >= 3 * 2**20  # exp(x), its gradient, the gradient of x
    assert memory.live == 2**20  # x.grad


def test_live_bytes_look_into_our_own_ops():
    """stage_exit concatenates and normalises inside: two maps of the input's size."""
    h = torch.randn(1, 64, 64, 16)
    with LiveBytes() as memory:
        norm = torch.ones(16), torch.zeros(16), 1e-5
        merging = torch.ones(64), torch.zeros(64), 1e-5, torch.randn(32, 64)
        _, out = ops.stage_exit(h, *norm, *merging)
    assert memory.peak >= 2 * h.nbytes > out.nbytes


def test_saved_bytes_count_a_storage_once_and_parameters_never():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)

    def run():
        return layer(x).tanh().exp().exp()  # saved: x, tanh, exp, exp

    assert saved_bytes(layer, run) == 4 * 4 * 8 * 4
    with SavedBytes() as saved:
        run()
    assert saved.total == 4 * 4 * 8 * 4 + layer.weight.nbytes


def test_trainable_parameters():
    trunk = FrozenSwin(SwinConfig(16, (1,), (1,), 3))
    backbone = E3VABackbone(trunk, HighwayConfig(1, 4))
    assert trainable_parameters(trunk) == 0
    per_tap = 2 * 16 * 4 + 2 * 4 * 8 + 8 + 2 * 4 * 4 + 4 * 3 * 3 + 4
    assert trainable_parameters(backbone) == 2 * per_tap + 16 + 2 * 16
