"""The tabs of a node's page; every `*_tab.py` here that exports `TAB = Tab(…)` is found at start-up.

A tab says what a node must serve for it to be shown, asks the node when it is looked at, and has a template of its own
(`templates/tabs/<name>.html`). Its actions change something: each says first what it will do (`Action`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from aiohttp import web

from lmcache_frontend.nodes.node import Node
from lmcache_frontend.pages.asking import Outcome, Question, ask
from lmcache_frontend.pages.confirming import Form, Plan, Result
from lmcache_frontend.pages.paths import node_path
from lmcache_frontend.telemetry.health.states import NodeHealth
from lmcache_shared.access.gate import caller_of
from lmcache_shared.access.roles import Role
from lmcache_shared.access.table import of_proxied
from lmcache_shared.errors import RouteError

MAX_SEARCH = 100
"""Characters of a search."""

MIN_DETAIL = 20
"""Characters: a shorter answer (`ok`) says no more than that it went well."""


@dataclass(frozen=True)
class View:
    """A node as somebody looks at it.

    Attributes:
        request: the caller's; `request.query` is what the page's address asks for.
        proxy: the name of the frontend that the node belongs to.
        health: what is known of it without asking.
    """

    request: web.Request
    proxy: str
    node: Node
    health: NodeHealth

    @property
    def name(self) -> str:
        return self.node.name

    def query(self, name: str, otherwise: str = "") -> str:
        """A parameter of the page's address."""
        return self.request.query.get(name, otherwise)

    @property
    def words(self) -> list[str]:
        """Those that the page's address searches for, each once: every row is compared with all of them."""
        return list(dict.fromkeys(self.query("q")[:MAX_SEARCH].lower().split()))

    def path(self, tab: str = "") -> str:
        """The address of a tab of this node."""
        return node_path(self.proxy, self.node.name, tab)

    @property
    def proxied(self) -> str:
        """Where the frontend passes requests on to the node, for links to what it says as it says it."""
        return self.node.reach.proxy_path

    async def ask(self, question: Question) -> Outcome:
        """Ask the node in the name of who looks."""
        return await ask(self.request, self.proxy, self.node, question)

    def lacks(self, method: str, path: str) -> Role | None:
        """The role that the caller would need to ask this and has not; a page says so before a form is sent."""
        role = max(of_proxied(method, path).role, Role.VIEWER)
        return role if caller_of(self.request).role < role else None

    async def get(self, path: str) -> Outcome:
        return await self.ask(Question("GET", path))


@dataclass(frozen=True)
class Action:
    """What a form of a tab does, at `POST …/{tab}/{name of the action}`.

    Attributes:
        plan: checks the form and says what will be done, with the old values; it changes nothing.
        run: does it, once the reader has confirmed.
    """

    plan: Callable[[View, Form], Awaitable[Plan]]
    run: Callable[[View, Form], Awaitable[Result]]


@dataclass(frozen=True)
class Tab:
    """A tab.

    Attributes:
        name: in the address, and of its template.
        title: what it is called.
        order: tabs stand by this.
        show: what the template gets, beside `view` and `tab`.
        serves: paths that a node must know, all of them; asked with OPTIONS, which changes nothing.
        answers: a GET that must not say 404, 501 or 503: an engine that is there, and not the route alone.
        setting: one that must not be off for the tab to be shown (`/conf`).
        refresh: its part is asked for again after so many seconds while somebody looks; 0 for never.
        topics: of `/api/stream`, those after which it is asked for; without any it is asked for again and again.
        actions: what its forms do.
    """

    name: str
    title: str
    order: int
    show: Callable[[View], Awaitable[Mapping[str, object]]]
    serves: tuple[str, ...] = ()
    answers: str = ""
    setting: str = ""
    refresh: int = 0
    topics: str = ""
    actions: Mapping[str, Action] = field(default_factory=dict)


def told(outcome: Outcome, done: str) -> Result:
    """The result of an action that was one question: `done` where it went well."""
    if outcome.ok:
        return Result(True, done, outcome.text if len(outcome.text) > MIN_DETAIL else "")
    return Result(False, outcome.problem, outcome.text if outcome.kind == "failed" else "", {"outcome": outcome})


def found() -> tuple[Tab, ...]:
    """Every tab, in order.

    Raises:
        RouteError: a module exports none, or two have one name.
    """
    tabs: dict[str, Tab] = {}
    for info in pkgutil.iter_modules(__path__):
        if not info.name.endswith("_tab"):
            continue
        tab = getattr(importlib.import_module(f"{__name__}.{info.name}"), "TAB", None)
        if not isinstance(tab, Tab):
            raise RouteError(f"{__name__}.{info.name}: exports no tab; write `TAB = Tab(…)` at its top level")
        if tab.name in tabs:
            raise RouteError(f"{__name__}.{info.name}: a tab {tab.name!r} is there already")
        tabs[tab.name] = tab
    return tuple(sorted(tabs.values(), key=lambda tab: (tab.order, tab.title)))
