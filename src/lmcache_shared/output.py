"""What a program says, on standard output and as log records, written by a thread of its own.

A pipe that nobody reads fills, and whoever writes into it then waits for ever: an event loop must not. The loop leaves
its lines in a queue. When that is full further ones are dropped and counted, and the count is told once there is room;
the end of the program waits for the last lines, but not for a reader that does not come.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import select
import sys
import time
from logging.handlers import QueueHandler, QueueListener

MAX_WAITING = 4096
"""Lines that wait to be written; a traceback counts as one."""

END_SECONDS = 1.0
"""How long the end of the program waits for the last lines to be taken."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` without what a terminal would obey; ends of lines and tabulators stay."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


class Output(QueueHandler):
    """A handler of log records, and with `say` the way to both of the program's outputs, in one order.

    Args:
        out: the file descriptor of standard output, `None` if there is none.
        err: that of standard error, where log records go.
        most: lines that may wait.
    """

    def __init__(self, out: int | None, err: int | None, *, most: int = MAX_WAITING) -> None:
        lines: queue.Queue[logging.LogRecord | None] = queue.Queue(most)
        super().__init__(lines)
        self._lines = lines
        self._out, self._err = out, err
        self._dropped = 0
        self._writer = _Writer(lines, self)
        self._writer.start()

    def say(self, text: str, *, is_error: bool = False) -> None:
        """A line as it is, on standard output or standard error."""
        line = _line(text, self._err if is_error else self._out)
        with self.lock or contextlib.nullcontext():
            self.enqueue(line)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The line that is written; formatted here, while what it tells of is as it was."""
        return _line(self.format(record), self._err)

    def enqueue(self, record: logging.LogRecord) -> None:
        """Leave a line; the caller holds the handler's lock."""
        record.dropped_before = self._dropped
        try:
            self._lines.put_nowait(record)
            self._dropped = 0
        except queue.Full:
            self._dropped += 1

    def take_dropped(self) -> int:
        """How many lines were dropped since the last one that was not."""
        with self.lock or contextlib.nullcontext():
            dropped, self._dropped = self._dropped, 0
        return dropped

    def write_dropped(self, count: int) -> None:
        """Tell of lines that are missing; for the thread that writes."""
        if count:
            told = logging.makeLogRecord({
                "name": __name__, "levelno": logging.WARNING, "levelname": "WARNING",
                "msg": f"{count} lines were dropped here: nobody read what this program writes",
            })  # fmt: skip
            _write(self._err, self.format(told))

    def close(self) -> None:
        """End the thread; `logging` calls it when the program ends."""
        self._writer.stop()
        super().close()


class _Writer(QueueListener):
    """The thread. It holds no lock while it writes: whoever ends the program would wait for it."""

    def __init__(self, lines: queue.Queue[logging.LogRecord | None], output: Output) -> None:
        super().__init__(lines)
        self._lines = lines
        self._output = output

    def handle(self, record: logging.LogRecord) -> None:
        self._output.write_dropped(record.__dict__["dropped_before"])
        _write(record.__dict__["to"], record.msg)
        if self._lines.empty():
            self._output.write_dropped(self._output.take_dropped())

    def stop(self) -> None:
        """Write what waits, for `END_SECONDS` at most: the thread is a daemon and may be left behind."""
        until = time.monotonic() + END_SECONDS
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=END_SECONDS)
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))


def of_this_process() -> Output:
    """One that writes to standard output and standard error."""
    return Output(_descriptor(sys.stdout), _descriptor(sys.stderr))


def installed() -> Output | None:
    """The one among the root logger's handlers, which owns it."""
    return next((handler for handler in logging.getLogger().handlers if isinstance(handler, Output)), None)


def _descriptor(stream: object) -> int | None:
    """A stream's file descriptor. One that was closed before the program began may be another file's by now."""
    try:
        return int(stream.fileno())  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return None


def _line(text: str, to: int | None) -> logging.LogRecord:
    return logging.makeLogRecord({"msg": text, "to": to})


def _write(to: int | None, text: str) -> None:
    """Write a line past Python's own buffers, whose locks a thread that is left behind would keep."""
    if to is None:
        return
    left = memoryview(f"{printable(text)}\n".encode(errors="backslashreplace"))
    with contextlib.suppress(OSError):  # nobody is there to read it, or a disk is full
        while left:
            try:
                left = left[os.write(to, left) :]
            except BlockingIOError:  # another process has made the file one that does not wait
                select.select([], [to], [])
