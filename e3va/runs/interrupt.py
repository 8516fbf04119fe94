"""Ctrl-C while something is half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def held_back() -> Iterator[None]:
    """Ctrl-C within the block is raised as KeyboardInterrupt at its end, when nothing is half done.

    Where Ctrl-C is ignored or handled otherwise, or in other threads, which get no signals, the
    block changes nothing.
    """
    came = False

    def note(*_: Any) -> None:
        nonlocal came
        came = True

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def ignore_interrupts(worker: int) -> None:
    """Of a process that loads data: the one that trains says when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
