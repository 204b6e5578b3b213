"""`match[]` as Prometheus' federation takes it: which samples are wanted.

Regular expressions are anchored, as Prometheus' are, and come from whoever may read metrics. Python's `re` can take
exponential time for a pattern of ten characters; RE2, whose syntax Prometheus has by way of Go, goes through the text
once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NamedTuple

import re2

from .lines import ExpositionError, shown

MAX_SELECTOR: Final = 4096
MAX_PATTERN: Final = 512
MAX_PATTERN_BYTES: Final = 1 << 20
"""What RE2 may take in memory for one; with less it is slower, and still goes through the text once."""

MAX_CACHED: Final = 2000
MAX_TEXT: Final = 4096
"""A longer value of a label matches no regular expression, and so every `!~`."""

_SPACE: Final = re.compile(r"[ \t\r\n]*")
_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OPERATOR: Final = re.compile(r"=~|!~|!=|=")
_QUOTED: Final = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'|`[^`]*`')
_ESCAPED: Final = re.compile(r"\\(.)", re.DOTALL)
_ESCAPES: Final = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t", "r": "\r"}


class _Condition(NamedTuple):
    label: str
    holds: Callable[[str], bool]


class Matcher:
    """What one `match[]` selects: all of its conditions hold. A label that is not there has an empty value."""

    def __init__(self, conditions: Sequence[_Condition]) -> None:
        self._conditions = tuple(conditions)

    def matches(self, name: str, labels: Mapping[str, str]) -> bool:
        """Whether a sample is selected."""
        return self.matches_labels(labels, ()) and self.matches_name(name)

    def matches_node(self, labels: Mapping[str, str]) -> bool:
        """Whether the conditions on these labels hold."""
        return all(holds(labels[label]) for label, holds in self._conditions if label in labels)

    def matches_labels(self, labels: Mapping[str, str], node_labels: Collection[str]) -> bool:
        """Whether the conditions on a sample's other labels hold."""
        return all(
            holds(labels.get(label, ""))
            for label, holds in self._conditions
            if label != "__name__" and label not in node_labels
        )

    def matches_name(self, name: str) -> bool:
        """Whether the conditions on a sample's name hold."""
        return all(holds(name) for label, holds in self._conditions if label == "__name__")


def parse_match(text: str) -> Matcher:
    """
    Raises:
        ExpositionError: it is no selector, would select everything, or has a regular expression that is refused.
    """
    if len(text) > MAX_SELECTOR:
        raise ExpositionError(f"match[]: longer than {MAX_SELECTOR} characters")
    try:
        conditions = _Selector(text).read()
        if all(holds("") for _, holds in conditions):
            raise ExpositionError("one condition at least must not hold for an empty value")
    except ExpositionError as error:
        raise ExpositionError(f"match[] {shown(text.encode('utf-8', 'replace'))}: {error}") from None
    return Matcher(conditions)


class _Selector:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def read(self) -> list[_Condition]:
        conditions = []
        self._skip(_SPACE)
        if name := self._skip(_NAME):
            conditions.append(_Condition("__name__", name.__eq__))
        self._skip(_SPACE)
        if self._takes("{"):
            while not self._takes("}"):
                conditions.append(self._condition())
                if not self._takes(","):
                    self._expect("}")
                    break
        elif not name:
            raise ExpositionError("expected a name or {")
        if self._at < len(self._text):
            raise ExpositionError(f"unexpected text at character {self._at + 1}")
        return conditions

    def _condition(self) -> _Condition:
        label, _, operator, _, quoted = map(self._skip, (_LABEL, _SPACE, _OPERATOR, _SPACE, _QUOTED))
        if not label or not operator or not quoted:
            raise ExpositionError(f'expected label="value" before character {self._at + 1}')
        self._skip(_SPACE)
        value = quoted[1:-1] if quoted[0] == "`" else _ESCAPED.sub(_unescaped, quoted[1:-1])
        test: Callable[[str], bool] = Pattern(value).matches if "~" in operator else value.__eq__
        return _Condition(label, (lambda text: not test(text)) if "!" in operator else test)

    def _skip(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return found[0] if found else ""

    def _takes(self, char: str) -> bool:
        if not self._text.startswith(char, self._at):
            return False
        self._at += 1
        self._skip(_SPACE)
        return True

    def _expect(self, char: str) -> None:
        if not self._takes(char):
            raise ExpositionError(f"expected {char} at character {self._at + 1}")


def _unescaped(found: re.Match[str]) -> str:
    if found[1] not in _ESCAPES:
        raise ExpositionError("an escape that is none")
    return _ESCAPES[found[1]]


class Pattern:
    """A regular expression that a whole text matches or not, in time proportional to the text."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN:
            raise ExpositionError(f"a regular expression of more than {MAX_PATTERN} characters")
        options = re2.Options()
        options.max_mem = MAX_PATTERN_BYTES
        options.dot_nl = True  # as in Prometheus
        options.log_errors = False
        try:
            self._compiled = re2.compile(pattern, options)
        except (re2.error, UnicodeEncodeError) as error:
            raise ExpositionError(f"a regular expression that RE2 does not take: {_told(error)}") from None
        self._known: dict[str, bool] = {}

    def matches(self, text: str) -> bool:
        known = self._known.get(text)
        if known is None:
            if len(self._known) >= MAX_CACHED:
                self._known.clear()
            fits = len(text) <= MAX_TEXT
            known = self._known[text] = fits and self._compiled.fullmatch(text) is not None
        return known


def _told(error: Exception) -> str:
    """RE2's own words, which come as bytes."""
    words = error.args[0] if isinstance(error, re2.error) and error.args else "not UTF-8"
    return shown(words if isinstance(words, bytes) else str(words).encode("utf-8", "replace"))
