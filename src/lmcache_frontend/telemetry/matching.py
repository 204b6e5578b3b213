"""`match[]` as Prometheus' federation takes it: which samples are wanted.

Regular expressions are anchored, as Prometheus' are, and come from whoever may read metrics. Python's `re` can take
exponential time for a pattern of ten characters, so the expressions are run here, as a set of states that goes through
the text once (Thompson 1968; Go's RE2, which Prometheus uses, does the same). What needs backtracking, as references
and lookaheads, RE2 does not have either; flags and Unicode classes, which it has, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final, NamedTuple

from .lines import ExpositionError, shown

MAX_SELECTOR: Final = 4096
MAX_PATTERN: Final = 512
MAX_STATES: Final = 1000
MAX_DEPTH: Final = 30
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
        return self.matches_node(labels) and self.matches_rest(name, labels, ())

    def matches_node(self, labels: Mapping[str, str]) -> bool:
        """Whether the conditions on these labels hold."""
        return all(holds(labels[label]) for label, holds in self._conditions if label in labels)

    def matches_rest(self, name: str, labels: Mapping[str, str], node_labels: Collection[str]) -> bool:
        """Whether all conditions hold but those on the labels that `matches_node` was asked about."""
        return all(
            holds(name if label == "__name__" else labels.get(label, ""))
            for label, holds in self._conditions
            if label not in node_labels
        )


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


class _Chars(NamedTuple):
    """A set of characters: ranges, or all others."""

    ranges: tuple[tuple[str, str], ...]
    others: bool = False

    def has(self, char: str) -> bool:
        return any(first <= char <= last for first, last in self.ranges) != self.others


_CLASSES: Final = {
    "d": _Chars((("0", "9"),)),
    "w": _Chars((("0", "9"), ("A", "Z"), ("_", "_"), ("a", "z"))),
    "s": _Chars(((" ", " "), ("\t", "\n"), ("\f", "\r"))),
}
_CONTROLS: Final = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_ANY: Final = _Chars((), others=True)

_Fragment = tuple[int, int]
"""The state where it begins, and the one where it ends, which leads nowhere yet."""


class Pattern:
    """A regular expression that a whole text matches or not, in time proportional to the text."""

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN:
            raise ExpositionError(f"a regular expression of more than {MAX_PATTERN} characters")
        self._free: list[list[int]] = []
        """By state: where it leads without a character."""
        self._by_char: list[tuple[_Chars, int] | None] = []
        begin, self._end = _PatternReader(pattern, self._state, self._free, self._by_char).read()
        self._begin = self._closure({begin})
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._known: dict[str, bool] = {}

    def matches(self, text: str) -> bool:
        known = self._known.get(text)
        if known is None:
            if len(self._known) >= MAX_CACHED:
                self._known.clear()
            known = self._known[text] = len(text) <= MAX_TEXT and self._run(text)
        return known

    def _run(self, text: str) -> bool:
        states = self._begin
        for char in text:
            following = self._steps.get((states, char))
            if following is None:
                if len(self._steps) >= MAX_CACHED:
                    self._steps.clear()
                moves = [move for state in states if (move := self._by_char[state]) is not None]
                following = self._closure({to for chars, to in moves if chars.has(char)})
                self._steps[states, char] = following
            states = following
            if not states:
                return False
        return self._end in states

    def _closure(self, states: set[int]) -> frozenset[int]:
        waiting = list(states)
        while waiting:
            for state in self._free[waiting.pop()]:
                if state not in states:
                    states.add(state)
                    waiting.append(state)
        return frozenset(states)

    def _state(self) -> int:
        if len(self._free) >= MAX_STATES:
            raise ExpositionError(f"a regular expression with more than {MAX_STATES} states")
        self._free.append([])
        self._by_char.append(None)
        return len(self._free) - 1


class _PatternReader:
    """Reads RE2's syntax, as far as it is taken here, into states."""

    def __init__(
        self,
        pattern: str,
        state: Callable[[], int],
        free: list[list[int]],
        by_char: list[tuple[_Chars, int] | None],
    ) -> None:
        self._pattern = pattern
        self._at = 0
        self._depth = 0
        self._state = state
        self._free = free
        self._by_char = by_char

    def read(self) -> _Fragment:
        if self._pattern.startswith("^"):
            self._at = 1
        fragment = self._alternatives()
        if self._at < len(self._pattern):
            raise ExpositionError("a regular expression with an unexpected )")
        return fragment

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _next(self) -> str:
        if self._at >= len(self._pattern):
            raise ExpositionError("a regular expression that is not complete")
        self._at += 1
        return self._pattern[self._at - 1]

    def _alternatives(self) -> _Fragment:
        begin, end = self._state(), self._state()
        while True:
            first, last = self._sequence()
            self._free[begin].append(first)
            self._free[last].append(end)
            if self._peek() != "|":
                return begin, end
            self._at += 1

    def _sequence(self) -> _Fragment:
        begin = end = self._state()
        while self._peek() not in ("", "|", ")"):
            if self._pattern[self._at :] == "$":
                self._at += 1
                break
            first, last = self._repeated()
            self._free[end].append(first)
            end = last
        return begin, end

    def _repeated(self) -> _Fragment:
        start = self._at
        fragment = self._atom()
        stop = self._at
        least, most = self._repeat()
        if (least, most) == (1, 1):
            return fragment
        begin = end = self._state()
        for number in range(max(least, 1) if most is None else most):
            if number:
                after, self._at = self._at, start
                fragment = self._atom()
                assert self._at == stop, "the same text is read again"
                self._at = after
            first, last = fragment
            following = self._state()
            self._free[end].append(first)
            self._free[last].append(following)
            if number >= least:
                self._free[end].append(following)
            if most is None and number == max(least, 1) - 1:
                self._free[following].append(first)
            end = following
        return begin, end

    def _repeat(self) -> tuple[int, int | None]:
        bounds: tuple[int, int | None] = (1, 1)
        char = self._peek()
        if char and char in "*+?":
            self._at += 1
            bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        elif char == "{":
            counts = re.compile(r"\{([0-9]{1,4})(?:(,)([0-9]{0,4}))?\}").match(self._pattern, self._at)
            if counts is None:
                raise ExpositionError("a regular expression with a { that has to be \\{")
            self._at = counts.end()
            least = int(counts[1])
            bounds = least, (int(counts[3]) if counts[3] else None) if counts[2] else least
            if bounds[1] is not None and bounds[1] < least:
                raise ExpositionError("a regular expression with a repeat that never ends")
        else:
            return bounds
        if self._peek() == "?":  # it does not matter who gets what
            self._at += 1
        if self._peek() and self._peek() in "*+?{":
            raise ExpositionError("a regular expression with a repeat of a repeat")
        return bounds

    def _atom(self) -> _Fragment:
        char = self._next()
        if char == "(":
            return self._group()
        if char in "*+?{^$":
            raise ExpositionError(f"a regular expression with {char} where it means nothing")
        chars = {".": lambda: _ANY, "[": self._class, "\\": self._escape}.get(char, lambda: _only(char))()
        begin, end = self._state(), self._state()
        self._by_char[begin] = (chars, end)
        return begin, end

    def _group(self) -> _Fragment:
        if self._peek() == "?":
            if not self._pattern.startswith("?:", self._at):
                raise ExpositionError("a regular expression with (? that is not (?:")
            self._at += 2
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ExpositionError(f"a regular expression with more than {MAX_DEPTH} groups in one another")
        fragment = self._alternatives()
        self._depth -= 1
        if self._next() != ")":
            raise ExpositionError("a regular expression without its )")
        return fragment

    def _escape(self) -> _Chars:
        char = self._next()
        if char.lower() in _CLASSES:
            ranges, _ = _CLASSES[char.lower()]
            return _Chars(ranges, others=char.isupper())
        if char in _CONTROLS:
            return _only(_CONTROLS[char])
        if char.isalnum():
            raise ExpositionError(f"a regular expression with \\{char}")
        return _only(char)

    def _class(self) -> _Chars:
        others = self._peek() == "^"
        self._at += others
        ranges: list[tuple[str, str]] = []
        while self._peek() != "]" or not ranges:
            if self._pattern.startswith("[:", self._at):
                raise ExpositionError("a regular expression with [:")
            one = self._class_char()
            first = one.ranges[0][0]
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                last = self._class_char()
                if one != _only(first) or last != _only(last.ranges[0][0]) or last.ranges[0][0] < first:
                    raise ExpositionError("a regular expression with a range that is none")
                one = _Chars(((first, last.ranges[0][0]),))
            if one.others:
                raise ExpositionError("a regular expression with \\D, \\S or \\W in [ ]")
            ranges += one.ranges
        self._at += 1
        return _Chars(tuple(ranges), others)

    def _class_char(self) -> _Chars:
        char = self._next()
        return self._escape() if char == "\\" else _only(char)


def _only(char: str) -> _Chars:
    return _Chars(((char, char),))
