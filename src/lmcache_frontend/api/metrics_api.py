"""`GET /metrics`: the metrics of every node as one exposition, and the frontend's own."""

from __future__ import annotations

import asyncio
import functools
import math
import zlib
from collections.abc import AsyncIterator, Iterator

from aiohttp import web

from lmcache_frontend.app import OPTIONS, REGISTRY
from lmcache_frontend.telemetry.metrics.exposition import ExpositionError, parse_match
from lmcache_frontend.telemetry.metrics.negotiation import OPENMETRICS_TYPE, TEXT_TYPE, wants_gzip, wants_openmetrics
from lmcache_frontend.telemetry.metrics.own import OWN_METRICS
from lmcache_frontend.telemetry.metrics.scrape import Leaf, Scraper, Wanted, leaves_of
from lmcache_shared.errors import Refusal

router = web.RouteTableDef()

TIMEOUT_FIELD = "X-Prometheus-Scrape-Timeout-Seconds"
"""How long Prometheus waits for the whole answer."""

WRITE_SECONDS = 0.5
WRITE_SECONDS_PER_NODE = 0.002
"""Of Prometheus' time, what is kept for writing the answer; at most half of it."""

SEND_SECONDS = 30.0
"""A caller who has not taken the whole answer by then is cut off: it is held in memory for it."""

NO_NODE = ""
"""`?node=`: the frontend's own metrics alone, beside a job that scrapes the nodes one by one."""

MAX_MATCHES = 64
PIECE_BYTES = 256 << 10
"""What is sent, or compressed, at once."""

GZIP_LEVEL = 1
"""Higher levels take two and three times as long for a few percent: expositions are repetition."""

SCRAPER: web.AppKey[Scraper] = web.AppKey("scraper", Scraper)


def setup(app: web.Application) -> None:
    app.cleanup_ctx.append(_scraper)


async def _scraper(app: web.Application) -> AsyncIterator[None]:
    registry = app[REGISTRY]
    app[SCRAPER] = Scraper(app[OWN_METRICS].describe, lambda proxy, name: registry.node(proxy, name) is not None)
    yield
    await app[SCRAPER].close()


@router.get("/metrics")
async def metrics(request: web.Request) -> web.StreamResponse:
    """Prometheus' text, or OpenMetrics if it is asked for; `node` and `match[]` narrow it."""
    wanted = _wanted(request)
    openmetrics = wants_openmetrics(",".join(request.headers.getall("Accept", [])))
    gzip = wants_gzip(",".join(request.headers.getall("Accept-Encoding", [])))
    response = web.StreamResponse(headers={"Content-Type": OPENMETRICS_TYPE if openmetrics else TEXT_TYPE})
    response.headers["Vary"] = "Accept, Accept-Encoding"
    if gzip:
        response.headers["Content-Encoding"] = "gzip"
    if request.method == "HEAD":
        await response.prepare(request)
        return response
    scraper = request.app[SCRAPER]
    async with scraper.round(wanted) as result:
        await response.prepare(request)
        pieces = _larger(result.write(openmetrics=openmetrics))
        timer = asyncio.get_running_loop().call_later(SEND_SECONDS, _cut_off, request)
        try:
            if gzip:
                await _send_compressed(response, pieces, scraper)
            else:
                for piece in pieces:
                    await response.write(piece)
                    await asyncio.sleep(0)  # a reader that keeps up would not let others have their turn
            await response.write_eof()
        except Refusal:
            _cut_off(request)  # half an exposition must not look whole
        finally:
            timer.cancel()
    return response


async def _send_compressed(response: web.StreamResponse, pieces: Iterator[bytes], scraper: Scraper) -> None:
    """The pieces, each compressed in a thread while the next one is written here."""
    deflating = zlib.compressobj(GZIP_LEVEL, wbits=16 + zlib.MAX_WBITS)
    for piece in pieces:
        await response.write(await scraper.in_thread(functools.partial(deflating.compress, piece)))
    await response.write(deflating.flush())


def _larger(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces of at least `PIECE_BYTES`: each costs a chunk, and maybe a word with a thread."""
    gathered = bytearray()
    for piece in pieces:
        gathered += piece
        if len(gathered) >= PIECE_BYTES:
            yield bytes(gathered)
            gathered.clear()
    yield bytes(gathered)


def _cut_off(request: web.Request) -> None:
    if request.transport is not None:
        request.transport.abort()


def _wanted(request: web.Request) -> Wanted:
    """Raises:
    Refusal: 404 for a node that nobody registered, 422 for another parameter that cannot be used.
    """
    leaves = leaves_of(list(request.app[REGISTRY].proxies()))
    names = request.query.getall("node", [])
    matches = request.query.getall("match[]", [])
    if len(matches) > MAX_MATCHES:
        raise _unprocessable("too_long", f"List should have at most {MAX_MATCHES} items", f"{len(matches)} items")
    for match in matches:
        try:
            parse_match(match)
        except ExpositionError as error:
            raise _unprocessable("value_error", f"Value error, {error}", match) from None
    chosen = leaves if not names else () if names == [NO_NODE] else _chosen(leaves, names)
    tells_own = names in ([], [NO_NODE])
    return Wanted(chosen, tuple(sorted(set(matches))), _seconds(request, len(chosen)), tells_own)


def _chosen(leaves: tuple[Leaf, ...], names: list[str]) -> tuple[Leaf, ...]:
    """The leaves that are named, as `node` (of whichever proxy) or `proxy/node`.

    Raises:
        Refusal: 404.
    """
    by_name: dict[str, list[Leaf]] = {}
    for leaf in leaves:
        by_name.setdefault(leaf.node.name, []).append(leaf)
        by_name.setdefault(f"{leaf.proxy}/{leaf.node.name}", []).append(leaf)
    chosen = set()
    for name in names:
        if name not in by_name:
            raise Refusal(404, f"Node with name '{name}' not found")
        chosen.update(by_name[name])
    return tuple(leaf for leaf in leaves if leaf in chosen)


def _seconds(request: web.Request, nodes: int) -> float:
    """How long the nodes have: what the options say, and no longer than Prometheus can wait.

    Raises:
        Refusal: 400, when Prometheus' field is no time.
    """
    seconds = request.app[OPTIONS].scrape_seconds
    text = request.headers.get(TIMEOUT_FIELD)
    if text is None:
        return seconds
    try:
        theirs = float(text)
    except ValueError:
        theirs = math.nan
    if not 0 < theirs < math.inf:
        raise Refusal(400, f"{TIMEOUT_FIELD}: {text[:100]!r} is no number of seconds")
    margin = min(theirs / 2, WRITE_SECONDS + nodes * WRITE_SECONDS_PER_NODE)
    return min(seconds, theirs - margin)


def _unprocessable(kind: str, message: str, given: str) -> Refusal:
    return Refusal(422, [{"type": kind, "loc": ["query", "match[]"], "msg": message, "input": given}])
