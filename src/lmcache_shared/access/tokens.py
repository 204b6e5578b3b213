"""The tokens that a server knows: one from a setting, and those of a file, of which only hashes are kept.

The file is YAML, `tokens:` with a list of `{name, role, sha256}`, or one such JSON object in each line. It is looked at
again when it changes. An entry that cannot be used is told in the log and counts for nothing; so do all of them while
the file cannot be read: a token that was taken back must not come back with a slip.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmcache_shared.access.caller import Caller
from lmcache_shared.access.roles import ROLES, Role
from lmcache_shared.config import MAX_FILE_BYTES, read_yaml
from lmcache_shared.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_TOKENS = 1000
MIN_LENGTH = 16
"""Of a token in a setting: `openssl rand -hex 16` makes 32."""

MAX_LENGTH = 512
LOOK_SECONDS = 1.0
"""How often the file is looked at, at most."""

SHOWN = 40
"""Characters of a value in a message."""

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[ -~]{1,64}")
_TOKEN = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class _Entry:
    name: str
    role: Role
    sha256: bytes


class Tokens:
    """Says whose a token is.

    Args:
        token: an admin's token.
        file: the path of a file of tokens.
        place: where the token is set, for refusals.

    Raises:
        ConfigError: the token is too short or has characters that no header field takes, or the file cannot be read.
    """

    def __init__(self, token: str | None, file: str | None, *, place: str) -> None:
        self._own: list[_Entry] = []
        if token:
            if not MIN_LENGTH <= len(token) <= MAX_LENGTH or not _TOKEN.fullmatch(token):
                raise ConfigError(
                    f"{place}: expected {MIN_LENGTH} to {MAX_LENGTH} visible ASCII characters; `openssl rand -hex 16`"
                    " makes some"
                )
            self._own.append(_Entry("token", Role.ADMIN, _hash(token)))
        self._file = file or None
        self._entries: list[_Entry] = []
        self._seen: object = None
        self._looked = time.monotonic()
        self._reading = asyncio.Lock()
        if self._file is not None:
            self._seen = _stamp(self._file)
            self._entries, problems = _read(self._file)
            _tell(problems)

    @property
    def configured(self) -> bool:
        """Whether there may be any: without one nobody's `Authorization` is this server's matter."""
        return bool(self._own) or self._file is not None

    async def find(self, token: str) -> Caller | None:
        """Whose it is. Every entry is compared, and each in constant time."""
        if self._file is not None and time.monotonic() - self._looked >= LOOK_SECONDS:
            async with self._reading:
                await self._look(self._file)
        wanted, found = _hash(token), None
        for entry in (*self._own, *self._entries):
            if hmac.compare_digest(entry.sha256, wanted):
                found = entry
        return None if found is None else Caller(found.name, found.role, by_token=True)

    async def _look(self, file: str) -> None:
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return  # another request has, meanwhile
        stamp = await asyncio.to_thread(_stamp, file)
        if stamp != self._seen:
            try:
                self._entries, problems = await asyncio.to_thread(_read, file)
            except ConfigError as error:
                self._entries, problems = [], [f"{error}; until it can be read none of its tokens counts"]
            self._seen = stamp
            _tell(problems)
        self._looked = time.monotonic()


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _stamp(file: str) -> object:
    try:
        info = os.stat(file)
    except OSError as error:
        return error.errno
    return info.st_ino, info.st_size, info.st_mtime_ns


def _tell(problems: list[str]) -> None:
    for problem in problems:
        logger.warning("%s", problem)


def _read(file: str) -> tuple[list[_Entry], list[str]]:
    """The entries that can be used, and a line for each that cannot; a token itself is never told.

    Raises:
        ConfigError: the file cannot be read, or is no such file.
    """
    entries: dict[bytes, _Entry] = {}
    problems: list[str] = []
    for place, form in _forms(file):
        entry = _entry(form)
        if len(entries) >= MAX_TOKENS:
            problems.append(f"{place}: at most {MAX_TOKENS} tokens are kept; this one and all after it are left out")
            break
        if isinstance(entry, str):
            problems.append(f"{place}: {entry}; the entry is left out")
        elif entry.sha256 in entries:
            problems.append(f"{place}: {entry.name!r} has the token of {entries[entry.sha256].name!r}; left out")
        else:
            entries[entry.sha256] = entry
    if not entries:
        problems.append(f"{file}: no token in it can be used; expected tokens: with a list of {{name, role, sha256}}")
    return list(entries.values()), problems


def _forms(file: str) -> Iterator[tuple[str, Any]]:
    try:
        with open(file, "rb") as stream:
            text = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot read the tokens: {getattr(error, 'strerror', error)}") from None
    if text.lstrip().startswith(b"{") and len(text) <= MAX_FILE_BYTES and not _is_one_document(text):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    yield f"{file}: line {number}", json.loads(line)
                except (ValueError, RecursionError):
                    yield f"{file}: line {number}", None
        return
    listed = read_yaml(file).get("tokens", [])
    if not isinstance(listed, list):
        raise ConfigError(f"{file}: tokens: expected a list of {{name, role, sha256}}")
    yield from ((f"{file}: tokens[{number}]", form) for number, form in enumerate(listed))


def _is_one_document(text: bytes) -> bool:
    """JSON is YAML too: `{"tokens": [...]}` as a whole."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(whole, dict) and "tokens" in whole


def _entry(form: Any) -> _Entry | str:
    """An entry, or what is wrong with it."""
    if not isinstance(form, dict):
        return "expected {name, role, sha256}"
    name, role, digest = (form.get(key) for key in ("name", "role", "sha256"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return "name: expected a text of 1 to 64 ASCII characters"
    if not isinstance(role, str) or role not in ROLES:
        return f"role: expected one of {', '.join(ROLES)}, found {ascii(role)[:SHOWN]}"
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        return "sha256: expected 64 hex digits in quotes, as `printf %s TOKEN | sha256sum` writes them"
    return _Entry(name, ROLES[role], bytes.fromhex(digest))
