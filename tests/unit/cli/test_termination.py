"""Handlers of SIGINT and SIGTERM."""

import signal
import subprocess
import sys

import pytest

from trimtab.util.termination import REPEAT_SECONDS, SigtermConverter, convert_sigterm, preserve_handlers

WAITING = """
import sys, time
from trimtab.util.termination import INTERRUPTED, convert_sigterm
with convert_sigterm() as converter:
    try:
        print("up", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        sys.exit(converter.get_exit_code(INTERRUPTED))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_both_signals_interrupt_with_their_exit_code(number, code):
    with subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(60) == code


def test_sigterm_calls_the_handler_of_sigint():
    received = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        with convert_sigterm() as converter:
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGINT]
        assert [converter.get_exit_code(code) for code in (0, 1, 130)] == [0, 1, 143]
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_interrupts_where_sigint_is_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with convert_sigterm(), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_immediate_repetition_has_no_effect(monkeypatch):
    now = 100.0
    monkeypatch.setattr("trimtab.util.termination.time.monotonic", lambda: now)
    converter = SigtermConverter()
    with pytest.raises(KeyboardInterrupt):
        converter(signal.SIGTERM, None)
    now += REPEAT_SECONDS / 2
    converter(signal.SIGTERM, None)
    now += REPEAT_SECONDS
    with pytest.raises(KeyboardInterrupt):
        converter(signal.SIGTERM, None)


def test_handlers_that_a_library_replaces_are_restored():
    with convert_sigterm() as converter:
        with preserve_handlers():
            signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        assert signal.getsignal(signal.SIGTERM) is converter
        with pytest.raises(KeyboardInterrupt):
            receive_sigterm_in_library()
        assert converter.get_exit_code(130) == 143
    assert signal.getsignal(signal.SIGTERM) is not converter


def test_default_handlers_are_not_restored():
    """Without a handler of the program, that of the library stops what the library has started."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with preserve_handlers():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def receive_sigterm_in_library() -> None:
    with preserve_handlers():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)
