"""Under autocast, too, an op computes in the dtypes that it is given: whoever calls it casts."""

import pytest
import torch

import e3va
from e3va import ops
from tests.ops.backends import backend_of
from tests.ops.test_highway import fused, make_parameters
from tests.ops.test_sublayer_epilogue import make_arguments


def sublayer_epilogue():
    return ops.sublayer_epilogue(*make_arguments((2, 3, 5), 24, 4, torch.float32))


def highway():
    parameters = make_parameters(2, 24, 5, 12, torch.float32)
    h, *x = (torch.randn(2, 3, 5, 24) for _ in range(3))
    out, state = fused(h, h, x, parameters)
    return out, state, *torch.autograd.grad(out.square().sum(), list(parameters.values()))


def window_attention():
    return (
        ops.window_attention(torch.randn(1, 9, 5, 96), torch.randn(96), torch.randn(25, 1), 3, 1),
    )


def stage_exit():
    h, *norm = (torch.randn(*size, 8).requires_grad_() for size in ((2, 3, 5), (), ()))
    merging = torch.randn(32), torch.randn(32), 1e-5, torch.randn(16, 32)
    outputs = ops.stage_exit(h, *norm, 1e-5, *merging)
    loss = sum(output.square().sum() for output in outputs)
    return *outputs, *torch.autograd.grad(loss, [h, *norm])


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [sublayer_epilogue, highway, window_attention, stage_exit])
def test_changes_nothing(op, dtype, backend):
    with e3va.backend(backend_of(backend)):
        expected = op()
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype):
            results = op()
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
