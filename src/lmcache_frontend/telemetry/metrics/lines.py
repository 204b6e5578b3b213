"""What one line of a Prometheus text may say, and the same line spelled in one way.

Sources: Prometheus' "Exposition formats" (text format 0.0.4), the OpenMetrics 1.0 specification, and what Prometheus'
own reader (`expfmt`, behind `promtool check metrics`) refuses although the text does not say so: hexadecimal numbers,
numbers beyond a float, unknown escapes in label values, `__name__` as a label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Final

MAX_LINE: Final = 65_536
MAX_LABELS: Final = 64
MAX_NUMBER: Final = 400
MAX_SHOWN: Final = 60

NAME: Final = rb"[a-zA-Z_:][a-zA-Z0-9_:]*"
_VALUE: Final = rb'"[^"\\\n]*(?:\\["\\n][^"\\\n]*)*"'
_PAIR: Final = rb"[a-zA-Z_][a-zA-Z0-9_]*=" + _VALUE
_SPACED_PAIR: Final = rb"[ \t]*[a-zA-Z_][a-zA-Z0-9_]*[ \t]*=[ \t]*" + _VALUE + rb"[ \t]*"
_LABELS: Final = rb"(?:" + _SPACED_PAIR + rb"(?:," + _SPACED_PAIR + rb")*(?:,[ \t]*)?|[ \t]*)"

_NAME: Final = re.compile(NAME)
_PAIRS: Final = re.compile(rb"(?:" + _PAIR + rb"(?:," + _PAIR + rb")*,?)?\}")
_EACH_PAIR: Final = re.compile(rb"([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*(" + _VALUE + rb")")
_SERIES: Final = re.compile(rb"[ \t]*(" + NAME + rb")[ \t]*(?:\{(" + _LABELS + rb")\}|(?=[ \t]))[ \t]*")
_NUMBERS: Final = re.compile(rb"([^ \t]+)(?:[ \t]+([^ \t#]+))?[ \t]*")
_EXEMPLAR: Final = re.compile(rb"[ \t]#[ \t]*\{" + _LABELS + rb"\}[ \t]*[^ \t]+(?:[ \t]+[^ \t]+)?[ \t]*")
_METADATA: Final = re.compile(rb"[ \t]*#[ \t]+(HELP|TYPE|UNIT)[ \t]+(" + NAME + rb")(?:[ \t]+(.*))?")
_NUMBER: Final = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|(?i:nan|[+-]?inf(?:inity)?)")
_ESCAPED: Final = re.compile(r"\\(.)")

_PLAIN: Final = b"0123456789+-.eE "
_SPECIAL: Final = frozenset((b"NaN", b"+Inf", b"-Inf"))


class ExpositionError(ValueError):
    """A text, or a selector, that is not as it has to be. One line; what it quotes is short and printable."""


def error_at(index: int, reason: str, quoted: bytes | None = None) -> ExpositionError:
    """`index` counts from 0, the message from 1."""
    return ExpositionError(f"line {index + 1}: {reason}" + ("" if quoted is None else f": {shown(quoted)}"))


def shown(text: bytes) -> str:
    cut = text[:MAX_SHOWN].decode("ascii", "backslashreplace")
    printable = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in cut)
    return printable[:MAX_SHOWN] + ("…" if len(text) > MAX_SHOWN or len(printable) > MAX_SHOWN else "")


def is_name(text: bytes) -> bool:
    return _NAME.fullmatch(text) is not None


def is_label_name(text: str) -> bool:
    return ":" not in text and text != "__name__" and is_name(text.encode("utf-8", "replace"))


def is_number(text: bytes) -> bool:
    """Whether Prometheus takes it: Go's `ParseFloat` without hexadecimals and underscores, nothing out of range."""
    if len(text) > MAX_NUMBER or not _NUMBER.fullmatch(text):
        return False
    return text[-1:] not in b"0123456789." or math.isfinite(float(text))


def are_numbers(texts: Sequence[bytes]) -> bool:
    """`is_number` of all, for a tenth of the time: C looks for odd characters, and reads and adds the numbers."""
    joined = b" ".join(texts)
    if joined.translate(None, _PLAIN):
        texts = [text for text in texts if text not in _SPECIAL]
        joined = b" ".join(texts)
    if joined.translate(None, _PLAIN) or len(joined) > MAX_NUMBER * len(texts):
        return all(map(is_number, texts))
    try:
        total = sum(map(float, texts))
    except ValueError:
        return False
    return math.isfinite(total) or all(map(is_number, texts))


def pairs_of(text: bytes) -> list[tuple[str, str]] | None:
    """The labels behind a `{`, up to and with the `}`, spelled without blanks; None when it is something else.

    Raises:
        ExpositionError: a label that Prometheus refuses, too many, or one twice.
        UnicodeDecodeError: not UTF-8.
    """
    if not _PAIRS.fullmatch(text):
        return None
    pairs = [(name.decode(), unescaped(value[1:-1].decode())) for name, value in _EACH_PAIR.findall(text)]
    names = {name for name, _ in pairs}
    if len(names) < len(pairs):
        raise ExpositionError("a label twice in one sample")
    if "__name__" in names:
        raise ExpositionError("the label __name__ is reserved")
    if len(pairs) > MAX_LABELS:
        raise ExpositionError(f"more than {MAX_LABELS} labels")
    return pairs


def unescaped(text: str) -> str:
    """As in a label's value."""
    return _ESCAPED.sub(lambda found: _UNESCAPED[found[1]], text) if "\\" in text else text


def unescaped_help(text: str, *, quotes: bool) -> str:
    """As in a `HELP`, where an escape that there is not is a backslash and what follows."""
    known = _UNESCAPED if quotes else {"\\": "\\", "n": "\n"}
    return _ESCAPED.sub(lambda found: known.get(found[1], found[0]), text) if "\\" in text else text


_UNESCAPED: Final = {"\\": "\\", "n": "\n", '"': '"'}


def escaped(text: str) -> bytes:
    """As in a label's value."""
    return escaped_help(text).replace(b'"', b'\\"')


def escaped_help(text: str) -> bytes:
    return text.replace("\\", "\\\\").replace("\n", "\\n").encode("utf-8", "replace")


def metadata_of(line: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Keyword, name and text of a `HELP`, `TYPE` or `UNIT`; None for any other comment."""
    found = _METADATA.fullmatch(line)
    return (found[1], found[2], found[3] or b"") if found else None


def plain_sample(line: bytes, *, openmetrics: bool) -> tuple[bytes, bytes]:
    """A sample's series and its number, spelled as prometheus_client does; a timestamp in milliseconds behind it.

    Raises:
        ExpositionError: it is no sample.
    """
    series = _SERIES.match(line)
    if series is None:
        raise ExpositionError(f"neither a sample nor a comment: {shown(line)}")
    numbers = _NUMBERS.match(line, series.end())
    if numbers is None or not is_number(numbers[1]):
        raise ExpositionError(f"no number behind the series: {shown(line[series.end() :])}")
    end = numbers.end()
    if openmetrics and end < len(line):
        exemplar = _EXEMPLAR.match(line, end - 1)
        end = exemplar.end() if exemplar else end
    if end < len(line):
        raise ExpositionError(f"text behind the sample: {shown(line[end:])}")
    prefix, number = series[1], numbers[1]
    if series[2]:
        prefix += b"{" + b",".join(b"=".join(pair) for pair in _EACH_PAIR.findall(series[2])) + b"}"
    if numbers[2] is not None:
        number += b" %d" % _milliseconds(numbers[2], openmetrics=openmetrics)
    return prefix, number


def _milliseconds(text: bytes, *, openmetrics: bool) -> int:
    stamp = None
    if openmetrics and is_number(text):
        seconds = float(text)
        stamp = round(seconds * 1000) if math.isfinite(seconds) else None
    elif len(text) < MAX_NUMBER and re.fullmatch(rb"[+-]?[0-9]+", text):
        stamp = int(text)
    if stamp is None or not -(2**63) <= stamp < 2**63:
        raise ExpositionError(f"not a timestamp: {shown(text)}")
    return stamp


def in_seconds(number: bytes) -> bytes:
    """A number with its timestamp, if any, as OpenMetrics has it."""
    value, blank, stamp = number.partition(b" ")
    if not blank:
        return number
    sign = b"-" if stamp.startswith(b"-") else b""
    seconds, milliseconds = divmod(abs(int(stamp)), 1000)
    return b"%b %b%d.%03d" % (value, sign, seconds, milliseconds)
