"""A step of Detectron2's training: in mixed precision on any device, its batch in parts, in one
process or several."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.engine import SimpleTrainer, create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from e3va.budget.probe import probe
from e3va.checkpoint import frozen_hash, frozen_names
from e3va.optim import stepping
from e3va.seeding import reseed


class StepTrainer(SimpleTrainer):
    """One optimizer step per iteration, in mixed precision on any device, of a batch that may be
    computed in parts. A loss that is not finite ends it before the step, with FloatingPointError.

    Args:
        model, data_loader, optimizer: as for ``SimpleTrainer``.
        dtype: what autocast computes in; under float16 the loss is scaled (default: no autocast).
        accumulate: the parts, of equal size, whose gradients are averaged (default 1); 0: to be
            set before the first step.
        seed: of what is random in the model, with the number of the process (default 0).
        early: whether the optimizer steps while the last part's backward runs, see
            :func:`e3va.optim.stepping`; not in float16 (default False).
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype | None = None,
        accumulate: int = 1,
        seed: int = 0,
        early: bool = False,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.seed = seed
        self._early = early
        self._device = next(model.parameters()).device.type
        self._dtype = dtype
        self.accumulate = accumulate
        self._scaler = torch.amp.GradScaler(self._device, enabled=dtype == torch.float16)

    def run_step(self) -> None:
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        reseed(self.seed, 1 + comm.get_rank(), self.iter)
        self.optimizer.zero_grad()
        means: dict[str, Tensor] = {}
        for part in range(self.accumulate):
            size, last = len(data) // self.accumulate, part == self.accumulate - 1
            with self._sync(last):
                with torch.autocast(self._device, self._dtype, enabled=self._dtype is not None):
                    losses = self.model(data[part * size : (part + 1) * size])
                for name, loss in losses.items():
                    means[name] = means.get(name, 0) + loss.detach() / self.accumulate
                if last:  # a loss that is not finite raises here, before anything is changed by it
                    self._write_metrics(means, data_time)
                with stepping(self.optimizer) if self._early and last else nullcontext():
                    self._scaler.scale(sum(losses.values()) / self.accumulate).backward()
        self.after_backward()
        if not self._early:
            self._scaler.step(self.optimizer)
            self._scaler.update()

    def probe(self, batch: list[dict[str, Any]]) -> torch.OutOfMemoryError | None:
        """Whether a part fits: None, or why not. Nothing is changed by it."""
        model = self.model
        if isinstance(model, DistributedDataParallel):
            model = model.module

        def loss() -> Tensor:
            with (
                EventStorage(),
                torch.autocast(self._device, self._dtype, enabled=self._dtype is not None),
            ):
                return sum(model(batch).values())

        try:
            probe(model, loss, self.optimizer)
        except torch.OutOfMemoryError as error:
            return error.with_traceback(None)  # whose frames hold what did not fit
        return None

    def _sync(self, last: bool) -> AbstractContextManager[None]:
        """Processes exchange gradients once per step."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"grad_scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state.get("grad_scaler"):  # there is none after training in another precision
            self._scaler.load_state_dict(state["grad_scaler"])


def distribute(model: nn.Module) -> nn.Module:
    """The model under DDP if there are several processes, which exchange what is trained alone: a
    frozen trunk that is the same everywhere is not sent around.

    Raises:
        ValueError: it has norms that only GPUs can synchronise, and is on a CPU.
    """
    if comm.get_world_size() == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    synchronised = [n for n, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    if synchronised and not on_gpu:
        raise ValueError(
            f"SyncBN works on GPUs alone, and {synchronised[0]} is on a CPU: set the NORM of its "
            "config section, such as MODEL.SEM_SEG_HEAD.NORM, to naiveSyncBN"
        )
    if len(set(comm.all_gather(frozen_hash(model)))) == 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, frozen_names(model)
        )
    more = {} if on_gpu else {"device_ids": None}
    return create_ddp_model(model, broadcast_buffers=False, **more)
