"""`GET /loglevel`: see and set the levels of the process's loggers."""

import logging
from dataclasses import dataclass

from aiohttp import web

from lmcache_shared.access.roles import Role, needs
from lmcache_shared.errors import Refusal
from lmcache_shared.responses import text_response
from lmcache_shared.schema import parse_query

router = web.RouteTableDef()

MAX_NAME_LENGTH = 255
MAX_LOGGERS = 10_000
"""Python keeps a logger for ever; past this many no new one is made on request."""


@dataclass(frozen=True)
class LogLevelQuery:
    logger_name: str | None = None
    level: str | None = None


@router.get("/loglevel")
@needs(Role.VIEWER, level=Role.OPERATOR)
async def loglevel(request: web.Request) -> web.Response:
    """All loggers; or one logger's level; or, with `level`, set it for the logger and all its handlers."""
    query = parse_query(request, LogLevelQuery)
    if not query.logger_name:
        if query.level:
            raise Refusal(400, "level is given without logger_name; name the logger to set (root is the root logger)")
        return text_response(_all_levels())
    if not query.level:
        return text_response(f"{query.logger_name}: {_level_of(query.logger_name)}")
    level = query.level.upper()
    number = logging.getLevelName(level)
    if not isinstance(number, int):
        return text_response(f"Invalid log level: {query.level[:MAX_NAME_LENGTH]}", status=400)
    logger = _logger(query.logger_name)
    logger.setLevel(number)
    for handler in logger.handlers:
        handler.setLevel(number)
    return text_response(f"Set {query.logger_name} level to {level} (including all handlers)")


def _all_levels() -> str:
    loggers = list(logging.Logger.manager.loggerDict.items())
    lines = [f"{name}: {logging.getLevelName(it.level)}\n" for name, it in loggers if isinstance(it, logging.Logger)]
    return "=== Loggers and Levels ===\n" + "".join(lines)


def _level_of(name: str) -> str:
    """Its level without making it: asking after a name must not keep a logger for it."""
    logger = logging.root if name == "root" else logging.Logger.manager.loggerDict.get(name)
    return logging.getLevelName(logger.level) if isinstance(logger, logging.Logger) else "NOTSET"


def _logger(name: str) -> logging.Logger:
    known = logging.Logger.manager.loggerDict
    if name not in known and name != "root" and (len(name) > MAX_NAME_LENGTH or len(known) >= MAX_LOGGERS):
        raise Refusal(
            400,
            f"logger_name {name[:MAX_NAME_LENGTH]!r} is not known, and no logger is made for it: its name is longer"
            f" than {MAX_NAME_LENGTH} characters, or there are {MAX_LOGGERS} loggers already",
        )
    return logging.getLogger(name)
