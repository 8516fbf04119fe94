"""The gradient of P from taps as they are kept, against float64."""

import pytest
import torch

from e3va.ops.storage import STORAGES, compress, expand
from tests.oracles import TOLERANCE, relative_error

pytest.importorskip("triton", reason="triton is not installed: its kernels are untested")

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    """The interpreter runs one program after the other."""
    from e3va.kernels import common

    monkeypatch.setattr(common, "SPLITS", 5)


def check(K, tokens, channels, rank, dtype, storage, spoil=lambda tensor: tensor):
    """dt as small as float16 just holds."""
    from e3va.kernels.tap_gradient import tap_gradient

    x = [torch.randn(tokens, channels).to(dtype) for _ in range(K)]
    dt = (torch.randn(K, tokens, rank) * 1e-3).to(dtype)
    if storage == "full":
        kept, scale = [spoil(x_k.to(DEVICE)) for x_k in x], None
    else:
        codes = [compress(x_k, storage, seed=5) for x_k in x]
        x = [expand(*code, storage, channels, torch.float64) for code in codes]
        kept, scale = (spoil(torch.stack(v).to(DEVICE)) for v in zip(*codes, strict=True))
    expected = torch.stack([x[k].double().t() @ dt[k].double() for k in range(K)])
    arguments = kept, scale, storage, spoil(dt.to(DEVICE)), channels
    dP = tap_gradient(*arguments)
    assert dP.dtype == torch.float32 and dP.shape == (K, channels, rank)
    assert relative_error(dP.cpu(), expected) <= TOLERANCE[dtype]
    assert torch.equal(dP, tap_gradient(*arguments))


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("channels, rank", [(1, 4), (37, 5), (96, 16), (192, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_any_tap(tokens, channels, rank, dtype, storage):
    """Parts of several tiles, the last ones short or empty."""
    check(1, tokens, channels, rank, dtype, storage)


def test_many_taps():
    check(5, 300, 37, 5, torch.float32, "int4")


@pytest.mark.parametrize("storage", ["full", "int8"])
def test_strided_input(storage):
    def strided(v):
        return v.mT.contiguous().mT

    check(2, 45, 24, 5, torch.float32, storage, strided)


def test_full_taps_do_not_overflow_float16():
    from e3va.kernels.tap_gradient import tap_gradient

    x = torch.full((4096, 8), 16.0, dtype=torch.float16, device=DEVICE)
    dP = tap_gradient([x], None, "full", x[None], 8)
    assert (dP == 4096 * 256.0).all()
