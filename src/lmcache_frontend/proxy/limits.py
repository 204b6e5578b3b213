"""What the proxy's requests may take: times, connections, bytes. One place, so that both transports keep the same."""

from __future__ import annotations

CONNECT_SECONDS = 5.0
"""To get a connection, its place in the line included."""

HEAD_SECONDS = 10.0
"""From the first byte of a request's head to its last."""

FIRST_BYTE_SECONDS = 60.0
"""From the request, or the last piece of its body, to the answer's head: LMCache's frontend waits so long for all."""

IDLE_SECONDS = 60.0
"""Between two pieces of an answer, or of a request's body."""

UPGRADE_IDLE_SECONDS = 300.0
"""Between two pieces of an upgraded connection, in either direction."""

CONNECTIONS_PER_TARGET = 1024

WAITING_PER_TARGET = 256
"""Requests in line for a connection; the next one is refused at once."""

CONNECTIONS = 8192
"""To all targets together."""

RETRY_SECONDS = 1
"""What a refused caller is told to wait (`Retry-After`)."""

FAILURES = 5
"""After so many connections in a row that could not be made, a target is skipped."""

SKIP_SECONDS = 1.0
"""For so long; then one request tries."""

KEEPALIVE_SECONDS = 4.0
"""An idle connection is dropped before its server does so: uvicorn, under LMCache's own servers, waits 5 seconds."""

MAX_HEAD_BYTES = 64 << 10
"""Of an answer's head, and of what stands between two pieces of a chunked body."""

BUFFERED_BYTES = 256 << 10
"""Of an answer, so much waits here for its caller before the target is held back."""

MAX_REASON_LENGTH = 300
