"""A DNS server on a loopback port, UDP and TCP, whose zone a test writes and changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import cast

import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdatatype
import dns.rrset

MAX_UDP_BYTES = 512


@dataclass
class DnsServer:
    """Answers from `zone`: `{"name. A": ["127.0.0.1"]}`. A name with no record of any type does not exist.

    `rcodes` answers a failure for a name of the zone or another; `silent` answers nothing.
    """

    zone: dict[str, list[str]] = field(default_factory=dict)
    rcodes: dict[str, str] = field(default_factory=dict)
    ttl: int = 300
    silent: bool = False
    port: int = 0
    asked: list[str] = field(default_factory=list)
    """`name. TYPE` of every question, `TCP` before those that came so."""

    @property
    def where(self) -> str:
        return f"127.0.0.1:{self.port}"

    def answer(self, wire: bytes, *, tcp: bool) -> bytes | None:
        query = dns.message.from_wire(wire)
        (question,) = query.question
        name, kind = question.name.to_text().lower(), dns.rdatatype.to_text(question.rdtype)
        self.asked.append(f"{'TCP ' if tcp else ''}{name} {kind}")
        if self.silent:
            return None
        response = dns.message.make_response(query)
        texts = self.zone.get(f"{name} {kind}", [])
        if name in self.rcodes:
            response.set_rcode(dns.rcode.from_text(self.rcodes[name]))
        elif texts:
            response.answer.append(dns.rrset.from_text_list(question.name, self.ttl, "IN", kind, texts))
        elif not any(key.startswith(f"{name} ") for key in self.zone):
            response.set_rcode(dns.rcode.NXDOMAIN)
        data = response.to_wire(max_size=65535)
        if not tcp and len(data) > MAX_UDP_BYTES:
            short = dns.message.make_response(query)
            short.flags |= dns.flags.TC
            data = short.to_wire()
        return data


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: DnsServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = self._server.answer(data, tcp=False)
        if answer is not None and self._transport is not None:
            self._transport.sendto(answer, addr)


@contextlib.asynccontextmanager
async def dns_server(**settings: object) -> AsyncIterator[DnsServer]:
    server = DnsServer(**settings)  # type: ignore[arg-type]

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            size = int.from_bytes(await reader.readexactly(2), "big")
            answer = server.answer(await reader.readexactly(size), tcp=True)
            if answer is not None:
                writer.write(len(answer).to_bytes(2, "big") + answer)
                await writer.drain()
        writer.close()

    tcp = await asyncio.start_server(talk, "127.0.0.1", 0)
    server.port = tcp.sockets[0].getsockname()[1]
    loop = asyncio.get_running_loop()
    udp, _ = await loop.create_datagram_endpoint(lambda: _Udp(server), local_addr=("127.0.0.1", server.port))
    try:
        yield server
    finally:
        udp.close()
        tcp.close()
