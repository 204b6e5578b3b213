"""`match[]` selectors, and the regular expressions in them against Python's."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_frontend.telemetry.metrics.lines import ExpositionError
from lmcache_frontend.telemetry.metrics.matching import MAX_TEXT, Pattern, parse_match

LABELS = {"job": "a", "code": "500", "path": "C:\\x\n"}


@pytest.mark.parametrize(
    "selector",
    [
        "up",
        " up { } ",
        'up{job="a"}',
        'up{job="a",}',
        "up{ job = 'a' , code != \"200\" }",
        '{__name__="up"}',
        '{__name__=~"u.|down"}',
        'up{code=~"5.."}',
        'up{code!~"4.."}',
        'up{missing=""}',
        'up{missing!="a"}',
        'up{code=~"[0-9]+",job=~"a|b"}',
        'up{path="C:\\\\x\\n"}',
        "up{path=~`C:\\\\x\\s`}",
    ],
)
def test_what_selects(selector: str) -> None:
    assert parse_match(selector).matches("up", LABELS)


@pytest.mark.parametrize(
    "selector",
    [
        "u",
        "up2",
        'up{job="b"}',
        'up{code=~"5"}',
        'up{code=~"50"}',
        'up{job!="a"}',
        'up{code!~"5.*"}',
        'up{missing="a"}',
    ],
)
def test_what_does_not_select(selector: str) -> None:
    assert not parse_match(selector).matches("up", LABELS)


@pytest.mark.parametrize(
    "selector",
    [
        "",
        "{}",
        '{job=""}',
        '{job=~".*"}',
        '{job!="a"}',
        "up{",
        "up}",
        "up{job}",
        "up{job=a}",
        'up{job="a" code="b"}',
        'up{job="a',
        'up{job=="a"}',
        'up{job="\\d"}',
        "up{,}",
        "up down",
        "up[5m]",
        "1up",
        "sum(up)",
        "x" * 5000,
        'up{job=~"("}',
        "up\n\x1b{",
    ],
)
def test_what_is_refused(selector: str) -> None:
    with pytest.raises(ExpositionError) as refused:
        parse_match(selector)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 250


@pytest.mark.parametrize(
    "pattern",
    r"( ) a) (a [a a** * +a a{2,1} (?=a) (?<!a) \1 [b-a] \ (a{1000}){1000} \y a\pX".split(" "),
)
def test_patterns_that_are_refused(pattern: str) -> None:
    with pytest.raises(ExpositionError):
        Pattern(pattern)


def test_patterns_that_are_too_deep_or_too_long() -> None:
    for pattern in ("a" * 513, "\ud800"):
        with pytest.raises(ExpositionError) as refused:
            Pattern(pattern)
        assert str(refused.value).isprintable()
    assert not Pattern("(" * 250 + ")" * 250).matches("a")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a|a)*b",
        "(a*)*b",
        "(.*)(.*)(.*)(.*)(.*)b",
        "(a?){60}a{60}",
        "((a{0,5}){0,5})*b",
        "(.?){110}!",
        "(.*[a-m]){3}(.?){90}!",
    ],
)
def test_patterns_that_take_other_engines_for_ever(pattern: str) -> None:
    assert not Pattern(pattern).matches("a" * 3000 + "c")
    assert not Pattern(".*").matches("a" * (MAX_TEXT + 1))


ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", "[a-b]", r"\d", r"\W", r"\.", "-", "[]a]", "[a-]", "é"])


def grown(parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(parts, parts).map("".join),
        st.tuples(parts, parts).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(parts, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{0,2}", "{1,}", "*?", "{0}"])).map(
            lambda two: f"({two[0]}){two[1]}"
        ),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(ATOMS, grown, max_leaves=6), st.lists(st.text("ab.-é1\n]", max_size=7), max_size=6))
def test_patterns_match_as_pythons_do(pattern: str, texts: list[str]) -> None:
    ours, theirs = Pattern(f"^{pattern}$"), re.compile(pattern, re.DOTALL | re.ASCII)
    for text in texts:
        assert ours.matches(text) == (theirs.fullmatch(text) is not None)
