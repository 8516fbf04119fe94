"""The trainer of a run of ``e3va train``, by Detectron2."""

from __future__ import annotations

import contextlib
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from detectron2.engine.hooks import EvalHook, HookBase, PeriodicCheckpointer
from detectron2.utils.events import CommonMetricPrinter, EventWriter

from e3va.detectron2.train import Trainer
from e3va.runs.folder import METRICS, History, rank
from e3va.runs.interrupt import held_back
from e3va.runs.progress import Bar, peak_bytes

_SCORES = {
    ("bbox", "AP"): "box_ap",
    ("bbox", "AP50"): "box_ap50",
    ("segm", "AP"): "mask_ap",
    ("segm", "AP50"): "mask_ap50",
    ("sem_seg", "mIoU"): "miou",
    ("sem_seg", "pACC"): "pixel_accuracy",
}
"""Detectron2's names of metrics, and ours."""


def scores(results: dict[str, Any]) -> dict[str, float]:
    """Our names of what Detectron2's evaluation gives; what is undefined is left out."""
    return {
        name: float(results[task][metric])
        for (task, metric), name in _SCORES.items()
        if metric in results.get(task, {}) and math.isfinite(results[task][metric])
    }


class RunTrainer(Trainer):
    """A trainer that tells of itself by one bar, keeps metrics.json and the best model, and stops
    at Ctrl-C after the iteration at hand, with a checkpoint.

    Attributes:
        metrics: of the last evaluation.
        history: metrics.json.
        done: iterations that have been done, as a whole.
    """

    history: History
    metrics: dict[str, float]
    done: int

    def train(self) -> dict[str, Any]:
        """Train from ``start_iter`` on, with the lines of metrics.json up to there, and make up an
        evaluation that was interrupted."""
        self.history = History(Path(self.cfg.OUTPUT_DIR) / METRICS, self.start_iter)
        self.metrics, self.done = {}, self.start_iter
        period = self.cfg.TEST.EVAL_PERIOD
        if period and self.start_iter % period == 0 and 0 < self.start_iter < self.max_iter:
            self._evaluate()
        try:
            return super().train()
        except KeyboardInterrupt:
            self._save()
            raise

    def build_hooks(self) -> list[HookBase]:
        hooks = super().build_hooks()
        for hook in hooks:
            if isinstance(hook, EvalHook):
                self._score, hook._func = hook._func, self._evaluate
            elif isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = 1
        # Before checkpoints are written and what was trained is evaluated: an iteration ends there.
        hooks.insert(2, _Step())
        return hooks

    def build_writers(self) -> list[EventWriter]:
        return [CommonMetricPrinter(self.max_iter)]  # to the log

    def after_train(self) -> None:
        try:
            if sys.exception() is None:
                super().after_train()
        finally:
            for hook in self._hooks:
                if isinstance(hook, _Step):
                    hook.close()

    def _evaluate(self) -> dict[str, Any]:
        """Detectron2's results, or none if the model has been evaluated as it is."""
        if before := self.history.evaluation(self.done):
            self.metrics = before
            return {}
        results = self._score()
        with held_back():
            self.metrics = scores(results)
            better = rank(self.metrics) > self.history.best()
            self.history.add(iteration=self.done, **self.metrics)
            if better:
                more = {"ema": self.average.state_dict()} if self.average else {}
                self.checkpointer.save_model("model_best", iteration=self.done - 1, **more)
        return results

    def _save(self) -> None:
        """Write a checkpoint of the iterations that have been done, instead of the last one."""
        if self.done == self.start_iter:
            return
        before = Path(self.checkpointer.get_checkpoint_file())
        self.iter = self.done - 1
        name = "model_final" if self.done == self.max_iter else f"model_{self.iter:07d}"
        self.checkpointer.save(name, iteration=self.iter)
        if re.fullmatch(r"model_\d+", before.stem) and before.stem != name:
            before.unlink(missing_ok=True)


class _Step(HookBase):
    """One bar, and a line of metrics.json an iteration, in which Ctrl-C is held back."""

    trainer: Any

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def before_train(self) -> None:
        self._bar = Bar(self.trainer.start_iter, self.trainer.max_iter)
        self._device = torch.device(self.trainer.cfg.MODEL.DEVICE)

    def before_step(self) -> None:
        self._stack.enter_context(held_back())
        self._began = time.perf_counter()
        self._lr = max(group["lr"] for group in self.trainer.optimizer.param_groups)

    def after_step(self) -> None:
        loss = self.trainer.storage.history("total_loss").latest()
        seconds = time.perf_counter() - self._began
        done = self.trainer.iter + 1
        self.trainer.history.add(iteration=done, loss=loss, lr=self._lr, seconds=seconds)
        self._bar.step(loss, self._lr, self.trainer.metrics, peak_bytes(self._device))
        self.trainer.done = done
        self._stack.close()

    def close(self) -> None:
        self._bar.close()
        self._stack.__exit__(*sys.exc_info())  # of a step that has failed no stop is made
