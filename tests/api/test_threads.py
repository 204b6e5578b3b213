import asyncio
import threading

from lmcache_api.pytest_plugin import StartApi


async def test_a_thread_is_found_by_a_part_of_its_name_and_by_its_number(api_server: StartApi) -> None:
    client = (await api_server()).client
    gate = threading.Event()

    def wait_for_the_gate() -> None:
        gate.wait(30)

    thread = threading.Thread(target=wait_for_the_gate, name="Odd-Thread-Name", daemon=True)
    thread.start()
    try:
        for query in ("name=odd-thread", f"thread_id={thread.ident}", f"name=ODD&thread_id={thread.ident}"):
            async with client.get(f"/threads?{query}") as response:
                text = await response.text()
            assert text.startswith(f"Thread: {thread!r}\nStack trace:\n")
            assert "in wait_for_the_gate" in text
            assert text.endswith("\n\n=== Thread Summary ===\nTotal threads: 1\n")
    finally:
        gate.set()
    thread.join()


async def test_tasks_of_the_server_are_named_too(api_server: StartApi) -> None:
    client = (await api_server()).client

    async def sleeping_task() -> None:
        await asyncio.sleep(30)

    task = asyncio.create_task(sleeping_task(), name="Odd-Task-Name")
    await asyncio.sleep(0)
    async with client.get("/threads?name=odd-task") as response:
        text = await response.text()
    task.cancel()
    assert text.startswith("Task: Odd-Task-Name (test_tasks_of_the_server_are_named_too.<locals>.sleeping_task)\n")
    assert "in sleeping_task" in text
    assert text.endswith("\n\n=== Thread Summary ===\nTotal threads: 0\n")


async def test_all(api_server: StartApi) -> None:
    client = (await api_server()).client
    async with client.get("/threads") as response:
        text = await response.text()
    assert "Thread: <_MainThread(MainThread" in text
    assert "Task: " in text
    assert text.rstrip().rsplit("\n", 1)[1] == f"Total threads: {text.count('Thread: <')}"
