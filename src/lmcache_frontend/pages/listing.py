"""Which nodes a page shows, and in which order: read from its address, the same for the overview and the list.

A page holds a bounded number of nodes, however many there are; the next ones are one link away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from urllib.parse import urlencode

from aiohttp import web

from lmcache_frontend.app import HEALTH, NEIGHBOURS, REGISTRY
from lmcache_frontend.nodes.node import LOCAL_PROXY, Proxy
from lmcache_frontend.pages.figures import DEFAULT_RANGE, HIT_RATE_PARTS, Figures, hit_rate_of
from lmcache_frontend.pages.paths import node_path
from lmcache_frontend.telemetry.health.states import STATES, NodeHealth
from lmcache_frontend.telemetry.history.ranges import RANGES

MAX_TEXT = 100
"""Characters of a search."""

MAX_TITLE = 200
"""Characters of a group's title."""

MAX_GROUPS = 50
"""Where there are more, those without a node on the page are not shown."""

PAGE_NODES = 120
"""Of one page: what a browser renews in a fraction of the time in which a reader would notice."""

_RANK = {state: rank for rank, state in enumerate(STATES)}
_ROLES = ("scheduler", "worker", "controller")


@dataclass(frozen=True)
class Row:
    """A node as a page shows it; `figures` are the newest values by series, `label` what it says of the label that is
    asked for.
    """

    health: NodeHealth
    stale: bool
    figures: Mapping[str, float | None]
    age: float | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return self.health.node.name

    @property
    def path(self) -> str:
        return node_path(self.health.proxy, self.health.node.name)

    @property
    def key(self) -> tuple[str, str]:
        return self.health.proxy, self.health.node.name

    @property
    def hit_rate(self) -> float | None:
        return hit_rate_of(self.figures)

    @property
    def seconds(self) -> float | None:
        """How long its last answer took."""
        return None if self.health.milliseconds is None else self.health.milliseconds / 1000

    def value(self, series: str) -> float | None:
        return self.figures.get(series)


GROUPS: Mapping[str, tuple[str, Callable[[Row], str]]] = {
    "frontend": ("Frontend", lambda row: "this frontend" if row.health.proxy == LOCAL_PROXY else row.health.proxy),
    "instance": ("Instance", lambda row: (row.health.instance or "unknown instance")[:MAX_TITLE]),
    "model": ("Model", lambda row: (row.health.model or "unknown model")[:MAX_TITLE]),
    "role": ("Role", lambda row: row.health.role or "unknown role"),
    "version": ("Version", lambda row: row.health.version or "unknown version"),
    "state": ("State", lambda row: row.health.state),
    "host": ("Host", lambda row: row.health.node.host),
    "source": ("Source", lambda row: row.health.node.source or "unknown source"),
    "label": ("Label …", lambda row: row.label),
    "none": ("Nothing", lambda row: ""),
}
"""By what nodes can be put together: its title, and the group of a node."""


def _by_value(series: str) -> Callable[[Row], tuple[object, ...]]:
    def key(row: Row) -> tuple[object, ...]:
        value = row.value(series)
        return (value is None, -(value or 0.0), row.name)

    return key


SORTS: Mapping[str, tuple[str, Callable[[Row], tuple[object, ...]]]] = {
    "state": ("State, worst first", lambda row: (_RANK[row.health.state], _role_rank(row), natural(row.name))),
    "name": ("Name", lambda row: natural(row.name)),
    "latency": ("Answers slowest", lambda row: (row.health.milliseconds is None, -(row.health.milliseconds or 0.0))),
    "load": ("Load, highest first", _by_value("load")),
    "requested": ("Requested tokens", _by_value("requested_tokens")),
    "retrieve": ("Retrieve p95, slowest first", _by_value("retrieve_p95")),
    "hits": ("Hit rate, lowest first", lambda row: _lowest(row.hit_rate, row.name)),
    "since": ("Changed last", lambda row: (row.health.since is None, -(_stamp(row)))),
}
"""In which order nodes can stand."""


def _role_rank(row: Row) -> int:
    return _ROLES.index(row.health.role) if row.health.role in _ROLES else len(_ROLES)


def natural(name: str) -> tuple[object, ...]:
    """worker9 before worker10: text and numbers in turn."""
    parts: list[object] = []
    digits = text = ""
    for c in name + "\0":
        if c.isascii() and c.isdigit() and len(digits) < 18:
            if text or not parts:
                parts.append(text)
                text = ""
            digits += c
        else:
            if digits:
                parts.append(int(digits))
                digits = ""
            text += c
    return (*parts, text)


def _lowest(value: float | None, name: str) -> tuple[object, ...]:
    return (value is None, value or 0.0, name)


def _stamp(row: Row) -> float:
    return row.health.since.timestamp() if row.health.since else 0.0


@dataclass(frozen=True)
class Choice:
    """What a page's address asks for; what it does not know is left at its default.

    `label` is by what the group `label` puts nodes together (labels.py); `only` is the title of the one group to show.
    """

    q: str = ""
    state: str = ""
    role: str = ""
    group: str = "frontend"
    label: str = ""
    only: str = ""
    sort: str = "state"
    range: str = DEFAULT_RANGE
    page: int = 1

    @classmethod
    def of(cls, request: web.Request) -> Choice:
        return cls.from_query(request.query.get)

    @classmethod
    def from_query(cls, asked: Callable[[str, str], str]) -> Choice:
        """From anything that gives a parameter or what is told otherwise."""
        page, group, sort = asked("page", ""), asked("group", ""), asked("sort", "")
        return cls(
            q=asked("q", "").strip()[:MAX_TEXT],
            state=asked("state", "") if asked("state", "") in STATES or asked("state", "") == "unhealthy" else "",
            role=asked("role", "")[:MAX_TEXT],
            group=group if group in GROUPS else cls.group,
            label=asked("label", "").strip()[:MAX_TEXT] if group == "label" else "",
            only=asked("only", "")[:MAX_TITLE],
            sort=sort if sort in SORTS else cls.sort,
            range=span if (span := asked("range", "")) in RANGES else DEFAULT_RANGE,
            page=int(page) if page.isascii() and page.isdigit() and 0 < len(page) < 6 and int(page) else 1,
        )

    @property
    def title(self) -> str:
        """What the chosen nodes have in common, for the window's title."""
        told = [self.state, self.role, self.only, f"“{self.q}”" if self.q else ""]
        return ", ".join(filter(None, told))

    def but(self, **changes: object) -> str:
        """The query of the same choice with something else chosen; a new choice begins at its first page."""
        other = replace(self, **{"page": 1, **changes})  # type: ignore[arg-type]
        default = Choice()
        asked = {
            name: getattr(other, name)
            for name in ("q", "state", "role", "group", "label", "only", "sort", "range", "page")
            if getattr(other, name) != getattr(default, name)
        }
        return "?" + urlencode(asked) if asked else "?"

    def takes(self, row: Row) -> bool:
        health = row.health
        if self.state == "unhealthy":
            if health.state == "up" and not row.stale:
                return False
        elif self.state and health.state != self.state:
            return False
        if self.role and (health.role or "unknown") != self.role:
            return False
        if not self.q:
            return True
        node = health.node
        told = (health.version, health.role, health.model, health.instance)
        text = " ".join((node.name, str(node.address), health.proxy, node.source, *filter(None, told))).lower()
        return all(word in text for word in self.q.lower().split())


@dataclass(frozen=True)
class Group:
    """Nodes that stand together; `rows` are those of this page, `counts` tell of all of them by state.

    Attributes:
        states: of all of them in their order, where not all are shown.
        proxy: the frontend that they belong to, where they are grouped by that.
        problem: why that one does not tell of its nodes.
        hit_rate, requested: of all its nodes together; the first weighs each node by its tokens.
    """

    title: str
    rows: Sequence[Row]
    counts: Mapping[str, int]
    states: Sequence[str] = ()
    proxy: Proxy | None = None
    problem: str | None = None
    hit_rate: float | None = None
    requested: float | None = None

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    @property
    def is_itself(self) -> bool:
        return self.proxy is not None and self.proxy.name == LOCAL_PROXY


@dataclass(frozen=True)
class Listing:
    """The nodes of a page, and what there is beside them; `everything` is what the filter chose from."""

    choice: Choice
    groups: Sequence[Group]
    counts: Mapping[str, int]
    total: int
    matched: int
    stale: int
    silent: int
    pages: int
    roles: Sequence[str]
    first: int = 0
    last: int = 0
    everything: Sequence[Row] = ()
    sorts: Mapping[str, str] = field(default_factory=lambda: {name: title for name, (title, _) in SORTS.items()})
    groupings: Mapping[str, str] = field(default_factory=lambda: {name: title for name, (title, _) in GROUPS.items()})

    @property
    def answering(self) -> int:
        return self.counts["up"] + self.counts["slow"]

    @property
    def rows(self) -> list[Row]:
        return [row for group in self.groups for row in group.rows]


def listing(
    app: web.Application,
    choice: Choice,
    figures: Figures,
    page_nodes: int = PAGE_NODES,
    labels: Mapping[tuple[str, str], str] | None = None,
) -> Listing:
    """The nodes that are chosen, grouped, sorted, and of them one page; `labels` are theirs by their keys."""
    by_proxy = list(app[HEALTH].by_proxy())
    rows = [
        Row(
            health,
            proxy.stale or health.node.stale,
            *figures.of(proxy.name, health.node.name),
            label=(labels or {}).get((proxy.name, health.node.name), ""),
        )
        for proxy, found in by_proxy
        for health in found
    ]
    counts = _counts(rows)
    chosen = sorted(filter(choice.takes, rows), key=SORTS[choice.sort][1])
    group_of = GROUPS[choice.group][1]
    if choice.only:
        chosen = [row for row in chosen if group_of(row) == choice.only]
    grouped: dict[str, list[Row]] = {}
    for row in chosen:
        grouped.setdefault(group_of(row), []).append(row)
    proxies = {_title(proxy): proxy for proxy, _ in by_proxy} if choice.group == "frontend" else {}
    if choice == replace(
        Choice(), label=choice.label, group=choice.group, sort=choice.sort, range=choice.range, page=choice.page
    ):
        for title in proxies:  # one without nodes is told of where nothing was asked for
            grouped.setdefault(title, [])
    pages = max(1, -(-len(chosen) // page_nodes))
    page = min(choice.page, pages)
    first = (page - 1) * page_nodes
    groups, passed = [], 0
    for title, members in _in_order(grouped, choice.group):
        begin, end = max(0, first - passed), max(0, first + page_nodes - passed)
        passed += len(members)
        shown = members[begin:end]
        states = [row.health.state for row in members] if len(shown) < len(members) else ()
        proxy = proxies.get(title)
        problem = None if proxy is None or proxy.name == LOCAL_PROXY else _problem(app, proxy)
        hit_rate, requested = _together(members)
        groups.append(Group(title, shown, _counts(members), states, proxy, problem, hit_rate, requested))
    if len(groups) > MAX_GROUPS:
        groups = [group for group in groups if group.rows]
    stale = sum(row.stale for row in rows)
    silent = sum(_problem(app, proxy) is not None for proxy, _ in by_proxy if proxy.name != LOCAL_PROXY)
    last = min(first + page_nodes, len(chosen))
    roles = sorted({row.health.role or "unknown" for row in rows})
    choice = replace(choice, page=page)
    return Listing(choice, groups, counts, len(rows), len(chosen), stale, silent, pages, roles, first + 1, last, rows)


def _title(proxy: Proxy) -> str:
    return "this frontend" if proxy.name == LOCAL_PROXY else proxy.name


def _problem(app: web.Application, proxy: Proxy) -> str | None:
    return app[NEIGHBOURS].problem(proxy.name)


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    counts: dict[str, int] = dict.fromkeys(STATES, 0)
    for row in rows:
        counts[row.health.state] += 1
    return counts


def _together(rows: Sequence[Row]) -> tuple[float | None, float | None]:
    """The hit rate and the requested tokens of several nodes."""
    rate = None
    for part, whole in HIT_RATE_PARTS:
        told = [(row.value(part), row.value(whole)) for row in rows]
        known = [(hits, asked) for hits, asked in told if hits is not None and asked]
        if known:
            rate = sum(hits for hits, _ in known) / sum(asked for _, asked in known)
            break
    requested = [value for row in rows if (value := row.value("requested_tokens")) is not None]
    return rate, sum(requested) if requested else None


def _in_order(grouped: dict[str, list[Row]], by: str) -> list[tuple[str, list[Row]]]:
    if by == "state":
        return sorted(grouped.items(), key=lambda it: _RANK.get(it[0], 9))  # type: ignore[call-overload]
    if by == "frontend":
        return list(grouped.items())
    return sorted(grouped.items(), key=lambda it: natural(it[0]))


def revision(app: web.Application) -> object:
    """Another one whenever a list of nodes would show something else."""
    problems = [app[NEIGHBOURS].problem(proxy.name) for proxy in app[REGISTRY].proxies()]
    return app[HEALTH].revision, app[REGISTRY].revision, problems
