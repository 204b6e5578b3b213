"""The values that pages show of nodes and of the cluster. What was never recorded is a gap, and no number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from aiohttp import web

Values = Mapping[str, float | None]


class Figures:
    """What is known at this moment."""

    def __init__(self, app: web.Application) -> None:
        self._app = app

    @property
    def revision(self) -> int:
        return 0

    def of(self, proxy: str, node: str) -> tuple[Values, float | None]:
        """A node's newest values by series, and how many seconds old they are."""
        return {}, None

    def total(self) -> Values:
        """The cluster's."""
        return {}

    def sparklines(self, series: str, keys: Iterable[tuple[str, str]]) -> Mapping[tuple[str, str], list[float | None]]:
        """The last five minutes of a series for each of these nodes."""
        return {key: [] for key in keys}

    def trend(self, series: str) -> list[float | None]:
        """The cluster's last hour."""
        return []
