"""Ctrl-C at a prompt: the machine answers first, so that what is set up on it outlives the key."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from vmxlab.cli.output import say


@contextlib.contextmanager
def answer_first() -> Iterator[None]:
    """Let the exchange inside come to its end before Ctrl-C is a KeyboardInterrupt; a second one is at once.

    A machine that is left in the middle of an exchange is lost: nobody knows where the conversation stands.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        say("waiting for the machine's answer; Ctrl-C again gives the machine up")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
