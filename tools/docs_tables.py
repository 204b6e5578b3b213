"""Writes the tables of settings, options and series into `docs/`, from their one definition (`make docs`)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from lmcache_frontend import options
from lmcache_frontend.telemetry.history.series import SERIES, Series
from lmcache_frontend.telemetry.metrics import own
from lmcache_shared import settings
from lmcache_shared.settings import Definition

DOCS = Path(__file__).parents[1] / "docs"


def settings_table() -> list[str]:
    return _settings_rows(engine=False)


def engine_table() -> list[str]:
    return _settings_rows(engine=True)


def _settings_rows(*, engine: bool) -> list[str]:
    rows = [row for row in settings.DEFINITIONS.values() if row.engine == engine]
    return [_row(f"`{row.key_path}`", f"`{row.env_name}`", _default(row), _meaning(row)) for row in rows]


def options_table() -> list[str]:
    rows = options.DEFINITIONS.values()
    return [
        _row(
            f"`--{row.name.replace('_', '-')}`",
            f"`{options.ENV_PREFIX}{row.name.upper()}`",
            _default(row),
            _meaning(row),
        )
        for row in rows
    ]


def own_metrics_table() -> list[str]:
    return [
        _row(f"`{row.name}`", row.kind, ", ".join(f"`{label}`" for label in row.labels), row.help)
        for row in own.FAMILIES.values()
    ]


def series_table() -> list[str]:
    return [_row(f"`{row.key}`", row.title, row.unit, row.kind, _families(row)) for row in SERIES.values()]


def _families(row: Series) -> str:
    if row.of is not None:
        return " / ".join(f"`{key}`" for key in row.of)
    return ", ".join(f"`{family}`" for family in row.families) or "the cluster alone"


TABLES = {
    "configuration.md": ("settings", settings_table),
    "engine.md": ("engine", engine_table),
    "frontend.md": ("options", options_table),
    "history.md": ("series", series_table),
    "metrics.md": ("own", own_metrics_table),
}


def with_table(text: str, name: str, rows: Iterable[str]) -> str:
    """`text` with the rows of the table between the marks of `name` put in."""
    marks = re.compile(rf"(<!-- {name}: [^\n]*-->\n\|[^\n]*\n\|[^\n]*\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"no marks for the table {name!r}")
    return marks.sub(lambda found: found[1] + "".join(f"{row}\n" for row in rows) + found[2], text)


def _meaning(row: Definition) -> str:
    """Its help, and the range of what is taken, and whether `POST /conf` takes it."""
    where = f" on the {row.only}" if row.only else ""
    return _limited(row) + (f" Mutable{where}." if row.mutable else "")


def _limited(row: Definition) -> str:
    if row.choices:
        return f"{row.help} ({', '.join(row.choices)})"
    if row.kind == settings.FileMode or (row.minimum is None and row.maximum is None):
        return row.help
    limits = f"{row.minimum:g} or more" if row.maximum is None else f"{row.minimum:g} to {row.maximum:.10g}"
    return f"{row.help} ({limits})"


def _default(row: Definition) -> str:
    if row.default is None or row.default == "":
        return ""
    if row.kind == settings.FileMode:
        return f"`{row.default:04o}`"
    return f"`{str(row.default).lower() if isinstance(row.default, bool) else row.default}`"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> int:
    for page, (name, table) in TABLES.items():
        path = DOCS / page
        path.write_text(with_table(path.read_text(), name, table()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
