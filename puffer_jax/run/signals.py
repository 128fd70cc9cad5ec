"""Ctrl-C and SIGTERM as requests to stop after the current epoch."""

import signal
from collections.abc import Callable
from types import FrameType


class StopRequest:
    """Inside `with`, the first Ctrl-C or SIGTERM is a request to stop; a second one interrupts.

    Args:
        announce: called when the request is made.

    Attributes:
        made: whether the request has been made.

    Raises:
        KeyboardInterrupt: at the second signal.
    """

    def __init__(self, announce: Callable[[], None]):
        self.made = False
        self._announce = announce
        self._handlers: dict[int, signal._HANDLER] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        self._announce()

    def __enter__(self) -> "StopRequest":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        except ValueError:  # not in the main thread: the signals are not ours to handle
            pass
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
