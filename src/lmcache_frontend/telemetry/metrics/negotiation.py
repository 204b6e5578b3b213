"""Which exposition a scrape asks for: the format by `Accept`, gzip by `Accept-Encoding` (RFC 9110, section 12.5).

Prometheus 2.42 sends `application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,
text/plain;version=0.0.4;q=0.5,*/*;q=0.1`, later ones name further formats before these.
"""

from __future__ import annotations

from collections.abc import Iterator

OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_TYPE = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"
TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_OPENMETRICS_VERSIONS = frozenset({"", "1.0.0", "0.0.1"})
_TEXT = frozenset({"text/plain", "text/*", "*/*"})

MAX_LENGTH = 4096
"""What is read of a field."""


def wants_openmetrics(accept: str) -> bool:
    """Whether OpenMetrics is wanted more than text; of equals, the text that every scraper reads wins unless it is only
    a wildcard.
    """
    openmetrics = text = wildcard = 0.0
    for name, parameters, weight in _items(accept):
        if name == OPENMETRICS and parameters.get("version", "") in _OPENMETRICS_VERSIONS:
            openmetrics = max(openmetrics, weight)
        elif name == "text/plain":
            text = max(text, weight)
        elif name in _TEXT:
            wildcard = max(wildcard, weight)
    return openmetrics > text and openmetrics >= wildcard


def wants_gzip(accept_encoding: str) -> bool:
    """Whether gzip is named, or `*` is, and not refused by `q=0`."""
    found = {name: weight for name, _, weight in _items(accept_encoding)}
    return found.get("gzip", found.get("x-gzip", found.get("*", 0.0))) > 0


def _items(field: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Each item's name in lower case, its parameters, and its weight; one with a weight that is none counts fully."""
    for item in field[:MAX_LENGTH].split(","):
        name, *rest = (part.strip() for part in item.split(";"))
        parameters = {
            key.strip().lower(): value.strip().strip('"') for key, _, value in (p.partition("=") for p in rest)
        }
        try:
            weight = float(parameters.get("q", "1"))
        except ValueError:
            weight = 1.0
        if name:
            yield name.lower(), parameters, weight
