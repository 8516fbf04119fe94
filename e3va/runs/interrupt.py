"""Ctrl-C, or SIGTERM by which batch systems end a job, while something is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM within the block raises KeyboardInterrupt, as Ctrl-C does.

    Where it is ignored or handled otherwise, or in other threads, the block changes nothing.
    """
    ours = _is_main() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def held_back() -> Iterator[None]:
    """A signal within the block that would raise KeyboardInterrupt does so at its end, when nothing
    is half done.

    Signals that are ignored or handled otherwise stay so; in other threads, which get none, the
    block changes nothing.
    """
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        came = True

    ours = [s for s in _SIGNALS if _is_main() and signal.getsignal(s) is signal.default_int_handler]
    for number in ours:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def ignore_interrupts(worker: int) -> None:
    """Of a process that loads data: the one that trains says when to stop. It does so by SIGTERM at
    the latest, which PyTorch has handled here since before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
