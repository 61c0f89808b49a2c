"""Handlers of SIGINT and SIGTERM for commands and for calls of Ray, which installs handlers of its own."""

import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
# Ray Jobs and process managers signal a process and its children, and a wrapper forwards the signal to the same child.
REPEAT_SECONDS = 1.0
HANDLED = (signal.SIGINT, signal.SIGTERM)


class SigtermConverter:
    """Handler that gives SIGTERM the effect of SIGINT; a repetition within `REPEAT_SECONDS` has no effect."""

    def __init__(self) -> None:
        self._received: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM.

        Raises:
            KeyboardInterrupt: unless the handler of SIGINT does something else.
        """
        now = time.monotonic()
        if self._received is not None and now - self._received < REPEAT_SECONDS:
            return
        self._received = now
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    def get_exit_code(self, code: int) -> int:
        """Return the exit code of a command: TERMINATED instead of INTERRUPTED if the signal was SIGTERM.

        Args:
            code: exit code of the command as if the signal had been SIGINT.
        """
        return TERMINATED if code == INTERRUPTED and self._received is not None else code


@contextmanager
def convert_sigterm() -> Generator[SigtermConverter]:
    """Give SIGTERM the effect of SIGINT inside the context. Outside of the main thread, handlers stay unchanged."""
    converter = SigtermConverter()
    with _use_handler(signal.SIGTERM, converter):
        yield converter


@contextmanager
def defer_interrupt(notify: Callable[[], None] | None = None) -> Generator[threading.Event]:
    """Set the yielded event on the first SIGINT inside the context; a second one raises KeyboardInterrupt.

    The caller finishes its current piece of work and then looks at the event. Outside of the main thread, handlers stay
    unchanged.

    Args:
        notify: called on the first SIGINT, to inform the user.
    """
    requested = threading.Event()

    def request_stop(number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        if notify:
            notify()

    with _use_handler(signal.SIGINT, request_stop):
        yield requested


@contextmanager
def preserve_handlers() -> Generator[None]:
    """Restore the handlers of SIGINT and SIGTERM at the end of the context, if there are any.

    Ray installs handlers in Python and in its C++ library: one exits without a shutdown, the other one aborts with a stack
    trace. Without a handler of the caller they stay, because Ray's handler at least stops a local node.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in HANDLED}
    handlers = {number: handler for number, handler in found.items() if handler not in (signal.SIG_DFL, None)}
    try:
        yield
    except SystemExit:
        # A SIGTERM that arrived inside the context called Ray's handler.
        if callable(handler := handlers.get(signal.SIGTERM)):
            handler(signal.SIGTERM, None)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _use_handler(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Generator[None]:
    """Handle a signal inside the context; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
