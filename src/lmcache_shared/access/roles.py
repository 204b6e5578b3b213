"""What a route needs: declared beside it, by `@needs` over its handler.

    @router.get("/env")
    @needs(Role.ADMIN)
    async def env(request): ...

    @router.get("/loglevel")
    @needs(Role.VIEWER, level=Role.OPERATOR)     # with a parameter `level` it changes something
    async def loglevel(request): ...

A route that declares nothing is judged by its method: one that is safe (RFC 9110, section 9.2.1) is for viewers, every
other for operators.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from aiohttp import web

from lmcache_shared.access.asking import Asking

H = TypeVar("H", bound=Callable[..., object])

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

_ATTRIBUTE = "lmcache_needs"


class Role(enum.IntEnum):
    """Each may all that those before it may."""

    NOBODY = 0
    """Nothing is known of the caller. What needs no more is open to everybody, always: whether the server is alive."""

    VIEWER = 1
    """Looks."""

    OPERATOR = 2
    """Changes."""

    ADMIN = 3
    """Runs code, reads what may be secret."""

    @property
    def title(self) -> str:
        return self.name.lower()


ROLES: Mapping[str, Role] = {role.title: role for role in (Role.VIEWER, Role.OPERATOR, Role.ADMIN)}
"""Those that a token can have, by name."""


@dataclass(frozen=True)
class Needs:
    """A role, and the higher one of a request that has a certain parameter in its query."""

    role: Role
    with_parameter: Mapping[str, Role] = field(default_factory=dict)

    def of(self, parameters: Iterable[str]) -> Role:
        """The role for a request with these parameters."""
        if not self.with_parameter:
            return self.role
        return max([self.role, *(self.with_parameter[name] for name in parameters if name in self.with_parameter)])


_LOOKS, _CHANGES = Needs(Role.VIEWER), Needs(Role.OPERATOR)


def needs(role: Role, **with_parameter: Role) -> Callable[[H], H]:
    """Declare what a handler needs."""

    def declare(handler: H) -> H:
        setattr(handler, _ATTRIBUTE, Needs(role, with_parameter))
        return handler

    return declare


def by_method(method: str) -> Needs:
    """Of a route that declares nothing."""
    return _LOOKS if method in SAFE_METHODS else _CHANGES


def declared(handler: object, method: str) -> Needs:
    """What a handler declares, or else its method."""
    found = getattr(handler, _ATTRIBUTE, None)
    return found if isinstance(found, Needs) else by_method(method)


def needed(request: Asking) -> Role:
    """The role that this request needs; what leads nowhere (404, 405) needs none."""
    match = request.match_info
    is_static = isinstance(match.route.resource, web.StaticResource)  # what every page loads, that to sign in too
    if match.http_exception is not None or is_static:
        return Role.NOBODY
    wanted = declared(match.handler, request.method)
    return wanted.of(request.query) if wanted.with_parameter else wanted.role
