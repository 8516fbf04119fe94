"""What training costs: memory, counted exactly and on any device, and time; used by demo, bench and
tests."""

from e3va.measure.live import CappedBytes, LiveBytes, SavedBytes, tensors_in
from e3va.measure.parts import SPLIT, bottom_up
from e3va.measure.seconds import Seconds, step_seconds
from e3va.measure.step import (
    make_gradients,
    make_state,
    peak_live_bytes,
    resident_bytes,
    saved_bytes,
    step_costs,
    step_split,
    trainable_parameters,
    whole_step_bytes,
)

__all__ = [
    "SPLIT",
    "CappedBytes",
    "LiveBytes",
    "SavedBytes",
    "Seconds",
    "bottom_up",
    "make_gradients",
    "make_state",
    "peak_live_bytes",
    "resident_bytes",
    "saved_bytes",
    "step_costs",
    "step_seconds",
    "step_split",
    "tensors_in",
    "trainable_parameters",
    "whole_step_bytes",
]
