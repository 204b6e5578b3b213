"""The processes of these tests: a real vLLM with our connector, as a server and inside a batch job.

Each is the first of a session of its own, is waited for within a bounded time, and is ended by its process id; what it
started and left behind is ended with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lmcache.processes import ROOT, SECRETS, Child, lmcache_environ

HERE = Path(__file__).parent
MODEL_NAME = "tiny"
SCHEDULER_PORT = 6999
SECRET = "of-the-tests"

START_SECONDS = 400.0
"""vLLM takes some 40 on two idle cores."""

END_SECONDS = 60.0
ANSWER_SECONDS = 60.0


@dataclass
class VLLM(Child):
    """A process with vLLM in it, and the socket on which our server of its scheduler answers."""

    scheduler: Path
    api: Path
    """The socket of vLLM's own server."""

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def expect(self, answer: str, *, seconds: float) -> None:
        """Fail when the next line on its standard output is another one."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline().decode().strip() if ready else f"nothing within {seconds:g} seconds"
        if line != answer:
            self.fail(f"it said {line!r}, not {answer!r}")

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n".encode())

    def terminate(self) -> int:
        """SIGTERM; its exit code."""
        self.process.terminate()
        return self.process.wait(END_SECONDS)

    def left_behind(self) -> list[str]:
        """The processes of its session, after those that are about to end have had five seconds."""
        deadline = time.monotonic() + 5
        while (left := _session(self.process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left


def connector(extra: Mapping[str, object] | None = None) -> str:
    """What `--kv-transfer-config` takes: the line of docs/vllm.md."""
    config = {
        "kv_connector": "LMCacheOpsConnector",
        "kv_connector_module_path": "lmcache_api.bridge.vllm_connector",
        "kv_role": "kv_both",
    }
    return json.dumps({**config, "kv_connector_extra_config": extra} if extra else config)


def make_model(python: str, folder: Path) -> Path:
    model = folder / "model"
    command = [python, str(HERE / "model.py"), str(model)]
    subprocess.run(command, env=_environ(folder), check=True, capture_output=True, timeout=START_SECONDS)
    return model


@contextlib.contextmanager
def running_server(python: str, folder: Path, model: Path) -> Iterator[VLLM]:
    """vLLM's OpenAI server; LMCache's settings are a file's."""
    config = folder / "lm.yaml"
    plugin = folder / "scheduler_told.sh"
    plugin.write_text(f'echo "$LMCACHE_RUNTIME_PLUGIN_CONFIG" >>{folder}/told.json\n')
    config.write_text(f"""chunk_size: 16
max_local_cpu_size: 0.5
remote_url: "redis://user:{SECRET}@localhost:1"
internal_api_server_enabled: true
internal_api_server_port_start: {SCHEDULER_PORT}
internal_api_server_socket_path_prefix: {folder}/ops
runtime_plugin_locations: ["{plugin}"]
""")
    options = ["--model", str(model), "--served-model-name", MODEL_NAME, "--uds", str(folder / "api")]
    options += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4", "--enforce-eager"]
    options += ["--shutdown-timeout", "30", "--kv-transfer-config", connector({"a_password": SECRET})]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *options]
    with _started(command, folder, LMCACHE_CONFIG_FILE=str(config), **SECRETS) as vllm:
        vllm.wait_until(
            lambda: _answers(vllm.api, "/health") and _answers(vllm.scheduler, "/version"),
            seconds=START_SECONDS,
            what="vLLM",
        )
        yield vllm


@contextlib.contextmanager
def running_offline(python: str, folder: Path, model: Path, *, prefix: str) -> Iterator[VLLM]:
    """`offline.py`; LMCache's settings are vLLM's command line's."""
    settings = {"internal_api_server_enabled": True, "internal_api_server_socket_path_prefix": prefix, "chunk_size": 16}
    extra: dict[str, object] = {f"lmcache.{name}": value for name, value in settings.items()}
    command = [python, str(HERE / "offline.py"), str(model), connector(extra)]
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "REVISION_OF_THE_TESTS": f"https://user:{SECRET}@localhost/a-model",  # vLLM tells its options as one text
    }
    with _started(command, folder, **variables) as vllm:
        vllm.expect("READY", seconds=START_SECONDS)
        yield vllm


@contextlib.contextmanager
def running_manager(python: str, folder: Path, model: Path) -> Iterator[VLLM]:
    """`second_way.py`; LMCache's settings are the environment's."""
    variables = {
        "LMCACHE_INTERNAL_API_SERVER_ENABLED": "true",
        "LMCACHE_INTERNAL_API_SERVER_SOCKET_PATH_PREFIX": f"{folder}/ops",
    }
    with _started([python, str(HERE / "second_way.py"), str(model)], folder, **variables) as vllm:
        vllm.expect("READY", seconds=START_SECONDS)
        yield vllm


@contextlib.contextmanager
def _started(command: Sequence[str], folder: Path, **variables: str) -> Iterator[VLLM]:
    log = folder / "vllm.log"
    with log.open("wb") as output:
        process: subprocess.Popen[bytes] = subprocess.Popen(
            command,
            cwd=folder,
            env=_environ(folder, **variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if command[1] != "-m" else output,
            stderr=output,
            bufsize=0,
            start_new_session=True,
        )
    try:
        yield VLLM(process, log, folder / f"ops_{SCHEDULER_PORT}", folder / "api")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_SECONDS)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _environ(folder: Path, **variables: str) -> dict[str, str]:
    """Nothing is downloaded and nothing reported; a small KV cache."""
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    own = {"PYTHONPATH": str(ROOT / "src"), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    return lmcache_environ(folder, **quiet, **own, **variables)


def _answers(path: Path, where: str) -> bool:
    """Whether a server on this socket answers 200."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        try:
            sock.connect(str(path))
            sock.sendall(f"GET {where} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            return sock.recv(12) == b"HTTP/1.1 200"
        except OSError:
            return False


def _session(leader: int) -> list[str]:
    """The processes of a session that have not ended: `pid (name)`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, tail = stat.read_text().rpartition(")")
            state, _, _, session = tail.split()[:4]
            if int(session) == leader and state != "Z":
                found.append(f"{head})")
    return found


def completion(prompt: str) -> dict[str, Any]:
    return {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
