"""What looks like a secret, by its name or by its content, and is shown as `***`.

A name is split into words at `_`, `-`, `.` and between small and capital letters; one word of `_SECRET_WORDS`, or one
that ends like `_SECRET_ENDINGS`, makes it secret: `HF_TOKEN`, `PGPASSWORD` and `redisPassword` are,
`TOKENIZERS_PARALLELISM` is not. `PWD` alone is the working folder. A plain number under a word that counts as often as
it hides (`MAX_TOKENS=512`) is shown. A value is secret by content when it holds a well-known token, a private key, an
`Authorization` value, a URL with a password or a signature, or an assignment such as `password=…` or `"api_key": "…"`.
Both rules would rather mask too much.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Mapping, Sequence

MASK = "***"

MAX_LOOKED_AT = 1 << 14
"""A longer value is masked unread: Linux has no longer variable, and reading it would hold every thread up."""

_SECRET_WORDS = frozenset(
    "secret secrets token tokens password passwords passwd passphrase pass pwd credential credentials cred creds"
    " auth authorization key keys apikey apikeys accesskey secretkey privatekey cookie cookies session jwt bearer"
    " signature salt dsn".split()
)
_SECRET_ENDINGS = (
    "password", "passwd", "passphrase", "secret", "token", "apikey", "authkey", "masterkey", "accountkey",
    "credentials", "sshpass", "dbpass", "userpass", "rootpass", "adminpass",
)  # fmt: skip
"""So that words run together count too: `PGPASSWORD`, `AUTHTOKEN`."""

_COUNTED_WORDS = frozenset({"tokens", "keys", "session"})
_NOT_SECRET_NAMES = frozenset({"PWD", "OLDPWD", "SSH_AUTH_SOCK", "XDG_SESSION_ID", "XDG_SESSION_TYPE"})

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_PLAIN_COUNT = re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?|true|false|", re.IGNORECASE)

_NEVER_COUNTS = re.compile("passw|passphrase|pwd|secret|cred", re.IGNORECASE)
"""In the name of a number that is none of `num_key_value_heads=8` and `eos_token_id=128009`."""

_CONTENT_RULE = r"""
      -----BEGIN\ [A-Z ]{0,30}PRIVATE\ KEY | LS0tLS1CRUdJTi                        # a private key, also in base64
    | \b(?:bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}
    | (?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.                   # a JSON web token
    | (?<![A-Za-z0-9_-])(?:sk|pk|rk|hf|nvapi|gsk|glpat|dop_v1|shpat|dckr_pat|xox[a-z])[-_][A-Za-z0-9_-]{16,}
    | \b(?:gh[a-z]_|github_pat_|npm_|pypi-|ya29\.|hvs\.|SG\.|dapi)[A-Za-z0-9_-]{16,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b | \bAIza[A-Za-z0-9_-]{30,} | hooks\.slack\.com/services/
    | ://[^/\s:@]{0,256}:[^\s@]{1,1024}@ | ://[^/\s:@]{16,256}@                      # a URL with a password or a token
    | [?&](?:sig|signature|x-amz-signature|x-goog-signature)=[^&\s]
    | (?:tokens?)["']?(?:\s{0,8}[:=]\s{0,8}|\s)["']?(?![\s"',}&]|null\b|true\b|false\b|[0-9]{1,9}\b)[^\s"',}&]
    | (?:password|passwd|passphrase|secret|credential|(?<![a-z])(?:pwd|pass|auth)
        |(?:api|access|secret|account|private|auth|master)[-_]?key)s?
      ["']?(?:\s{0,8}[:=]\s{0,8}|\s)["']?(?![\s"',}&]|null\b|true\b|false\b)[^\s"',}&]
    """
"""What a value holds that is a secret; each alternative takes linear time."""


@functools.cache
def _secret_content() -> re.Pattern[str]:
    """Compiled when it is first needed, not when a host process imports the server."""
    return re.compile(_CONTENT_RULE, re.IGNORECASE | re.VERBOSE)


def masked(values: Mapping[str, str], extra_names: Sequence[str] = ()) -> dict[str, str]:
    """`values`, `***` for each that looks secret; `extra_names` are further patterns of names (`*` is any text)."""
    patterns = [pattern.upper() for pattern in extra_names]
    return {name: MASK if is_secret(name, value, patterns) else value for name, value in values.items()}


def masked_within(value: object, name: str = "", extra_names: Sequence[str] = ()) -> object:
    """`value`, as `responses.plain` gives it, with all in it that looks secret as `***`.

    `name` is what it is called; inside a mapping each value goes by its own name. What `extra_names` name is masked
    whatever it is; of numbers beside those, passwords and such of more than nine digits under a secret name.
    """
    return _masked_within(value, name, [pattern.upper() for pattern in extra_names])


def _masked_within(value: object, name: str, patterns: Sequence[str]) -> object:
    if value is None or value == "":
        return value
    if _is_named(name, patterns):
        return MASK
    if isinstance(value, str):
        return MASK if is_secret(name, value) else value
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = str(value)
        counts = _PLAIN_COUNT.fullmatch(text) and not _NEVER_COUNTS.search(name)
        return MASK if _has_secret_name(name, text) and not counts else value
    if isinstance(value, Mapping):
        within = f"{name}." if _has_secret_name(name, "") else ""  # what stands under a secret's name is one
        return {key: _masked_within(inner, f"{within}{key}", patterns) for key, inner in value.items()}
    if isinstance(value, list):
        return [_masked_within(inner, name, patterns) for inner in value]
    return value


def is_secret(name: str, value: str, patterns: Sequence[str] = ()) -> bool:
    """Whether the variable looks like a secret; `patterns` are name patterns in capitals."""
    if len(value) > MAX_LOOKED_AT or _is_named(name, patterns):
        return True
    return _has_secret_name(name, value) or _secret_content().search(value) is not None


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name.upper(), pattern) for pattern in patterns)


def _has_secret_name(name: str, value: str) -> bool:
    if name in _NOT_SECRET_NAMES:
        return False
    words = {word.lower() for word in _WORD.findall(name)}
    words = {word for word in words if word in _SECRET_WORDS or word.endswith(_SECRET_ENDINGS)}
    if words and words <= _COUNTED_WORDS and _PLAIN_COUNT.fullmatch(value):
        return False
    return bool(words)
