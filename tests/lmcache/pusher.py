"""What a worker of LMCache pushes to its controller: `pusher.py PORT SECONDS`, or with `broken` no message at all.

Run by the Python that has LMCache. It says how many messages it has sent.
"""

from __future__ import annotations

import sys
import time


def main(port: str, seconds: str) -> None:
    import msgspec
    import zmq
    from lmcache.v1.cache_controller.message import BatchedKVOperationMsg

    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.connect(f"tcp://127.0.0.1:{port}")
    sent = 0
    if seconds == "broken":
        push.send(b"\xc1")
    else:
        message = BatchedKVOperationMsg(instance_id="nobody", worker_id=0, location="L", operations=[])
        encoded = msgspec.msgpack.encode(message)
        until = time.monotonic() + float(seconds)
        while time.monotonic() < until:
            push.send(encoded)
            sent += 1
            time.sleep(0.001)
    push.close(linger=5000)
    context.term()
    sys.stdout.write(f"{sent}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
