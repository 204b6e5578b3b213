import asyncio
import threading

import pytest

from lmcache_shared.blocking import BlockingPool, together
from lmcache_shared.errors import Refusal


async def test_a_call_is_made_in_a_daemon_thread_and_its_error_is_raised() -> None:
    pool = BlockingPool("pool")
    name, daemon = await pool.run(
        lambda: (threading.current_thread().name, threading.current_thread().daemon), seconds=5, what="x"
    )
    assert (name, daemon) == ("pool-1", True)
    with pytest.raises(ZeroDivisionError):
        await pool.run(lambda: 1 // 0, seconds=5, what="x")
    pool.close()


async def test_past_the_deadline_it_is_a_504_and_a_full_pool_a_503() -> None:
    pool = BlockingPool("pool", threads=1, waiting=1)
    gate = threading.Event()
    late = [asyncio.create_task(pool.run(gate.wait, seconds=0.05, what="waiting")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Refusal, match="503: waiting: too many calls"):
        await pool.run(gate.wait, seconds=0.05, what="waiting")
    for task, outcome in zip(late, ("it may still finish", "it was not begun"), strict=True):
        with pytest.raises(Refusal, match=rf"504: waiting: not done within 0\.05 seconds; {outcome}"):
            await task
    with pytest.raises(Refusal, match="503"):  # the calls still hold their places
        await pool.run(gate.wait, seconds=0.05, what="waiting")
    gate.set()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if pool._calls == 0:
            break
    assert await pool.run(lambda: 7, seconds=5, what="x") == 7
    pool.close()


async def test_threads_are_as_few_as_the_calls_need() -> None:
    pool = BlockingPool("few", threads=3)
    for _ in range(5):
        await pool.run(lambda: None, seconds=5, what="x")
    assert [t.name for t in threading.enumerate() if t.name.startswith("few-")] == ["few-1"]
    pool.close()
    for _ in range(100):
        await asyncio.sleep(0.01)
        if not [t for t in threading.enumerate() if t.name.startswith("few-")]:
            return
    pytest.fail("the thread did not end after close()")


@pytest.mark.parametrize(
    "raised",
    [asyncio.CancelledError, StopIteration, GeneratorExit, SystemExit, KeyboardInterrupt],
    ids=lambda e: e.__name__,
)
async def test_what_the_loop_would_take_for_itself_is_a_failure(raised: type[BaseException]) -> None:
    def call() -> None:
        raise raised("from the engine")

    pool = BlockingPool("test")
    try:
        with pytest.raises(RuntimeError, match=f"{raised.__name__}: from the engine"):
            await pool.run(call, seconds=5, what="it")
        assert await pool.run(lambda: 7, seconds=5, what="it") == 7
    finally:
        pool.close()


async def test_what_nobody_waits_for_any_more_is_never_made() -> None:
    pool = BlockingPool("pool", threads=1, waiting=3)
    gate, made = threading.Event(), []
    holding = asyncio.create_task(pool.run(gate.wait, seconds=5, what="holding"))
    await asyncio.sleep(0)
    with pytest.raises(Refusal, match="it was not begun"):
        await pool.run(lambda: made.append("late"), seconds=0.01, what="late")
    left = asyncio.create_task(pool.run(lambda: made.append("left"), seconds=5, what="left"))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    gate.set()
    await holding
    assert await pool.run(lambda: made.append("asked for"), seconds=5, what="asked for") is None
    assert made == ["asked for"]
    pool.close()


def test_together_waits_no_longer_than_it_may() -> None:
    gate, made = threading.Event(), []

    def fail() -> int:
        raise ZeroDivisionError

    calls = [lambda: 7, fail, lambda: gate.wait(30), lambda: made.append(1) or 8]
    results = together(calls, at_once=1, seconds=0.2)
    assert results[0] == 7
    assert isinstance(results[1], ZeroDivisionError)
    assert results[2:] == [None, None]
    gate.set()
    assert made == []  # it had not begun, and never does
    assert together(calls, at_once=4, seconds=5)[2:] == [True, 8]
    assert together([], at_once=4, seconds=5) == []
