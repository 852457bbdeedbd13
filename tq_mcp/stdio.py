"""Stdin as the server reads it: passed on by a thread, so that Ctrl-C can end it."""

import os
import signal
import socket
from collections.abc import Generator
from contextlib import contextmanager, suppress
from threading import Thread

STDIN = 0
CHUNK_BYTES = 65_536


@contextmanager
def interruptible_stdin() -> Generator[None]:
    """Have SIGINT end what file descriptor 0 reads, as a client that goes does; then raise KeyboardInterrupt.

    Nothing wakes a thread that waits for a terminal or a pipe, and the SDK waits for the thread that reads its stdin.
    So another thread reads the real one, and nobody waits for that. A second SIGINT does not wait for anything.
    """
    source, sink = socket.socketpair()
    real = os.dup(STDIN)
    interrupted = False

    def interrupt(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _end(sink)

    before = signal.signal(signal.SIGINT, interrupt)
    os.dup2(source.fileno(), STDIN)
    source.close()
    Thread(target=_pass_on, args=(real, sink), name="stdin", daemon=True).start()
    try:
        yield
    finally:
        os.dup2(real, STDIN)
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


def _pass_on(real: int, sink: socket.socket) -> None:
    with suppress(OSError):
        while read := os.read(real, CHUNK_BYTES):
            sink.sendall(read)
    _end(sink)


def _end(sink: socket.socket) -> None:
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
