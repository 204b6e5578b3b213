"""A range of tokens as a form and an address write it: `start` and `end`, the end not among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DEFAULT_END = 512
MAX_DIGITS = 12


@dataclass(frozen=True)
class TokenRange:
    """Tokens `start` to `end`, as `tokens_mock` has them.

    Attributes:
        problem: what is wrong with what was written; then the numbers are those of the default.
    """

    start: int = 0
    end: int = DEFAULT_END
    problem: str = ""

    @classmethod
    def of(cls, get: Callable[[str, str], str], *, most: int = 0) -> TokenRange:
        """What `get("start", …)` and `get("end", …)` tell.

        Args:
            most: so many tokens may be named; 0 leaves it to the node.
        """
        numbers = []
        for name, default in (("start", 0), ("end", DEFAULT_END)):
            text = get(name, "").strip()
            if text and not (text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS):
                return cls(problem=f"{name} {text[:40]!r} is no number of a token: write digits, as in 0 and 512")
            numbers.append(int(text) if text else default)
        start, end = numbers
        if start >= end:
            return cls(
                problem=f"the tokens {start} to {end} are none: the end, which is not among them, has to be larger"
            )
        if most and end - start > most:
            return cls(problem=f"{end - start:,} tokens, but a page asks for {most:,} at most")
        return cls(start, end)

    @property
    def text(self) -> str:
        return f"{self.start:,} to {self.end:,}"

    @property
    def query(self) -> str:
        return f"tokens_mock={self.start},{self.end}"

    @property
    def count(self) -> int:
        return self.end - self.start
