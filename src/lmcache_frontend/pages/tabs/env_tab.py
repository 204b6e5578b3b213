"""The environment of the node's process, in groups by the names' prefixes; the node has masked what is secret."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lmcache_frontend.pages.reading import text
from lmcache_frontend.pages.tabs import Tab, View
from lmcache_shared.secrets import MASK

KNOWN = (
    ("LMCache", ("LMCACHE",)),
    ("vLLM", ("VLLM",)),
    ("GPU", ("CUDA", "NVIDIA", "NCCL", "CUDNN", "ROCM", "HIP", "HSA", "GPU")),
    ("PyTorch and numbers", ("TORCH", "PYTORCH", "TRITON", "OMP", "MKL", "OPENBLAS")),
    ("Models", ("HF", "HUGGINGFACE", "TRANSFORMERS", "TOKENIZERS", "SAFETENSORS")),
    ("Network", ("UCX", "NIXL", "GLOO", "HTTP", "HTTPS", "NO", "SSL", "REDIS")),
    ("Python", ("PYTHON", "PYTHONPATH", "PYTHONHASHSEED", "VIRTUAL", "CONDA", "PIP", "UV")),
    ("Kubernetes", ("KUBERNETES", "POD", "NODE", "HOSTNAME")),
)
"""Groups that come first, each with the first words of its names."""

MAX_VARIABLES = 3000
OTHERS = "Everything else"
LEAST = 3
"""So many names of one prefix make a group of their own."""

LONG = 400
"""Characters from which a value is folded."""


@dataclass(frozen=True)
class Variable:
    name: str
    value: str

    @property
    def is_masked(self) -> bool:
        return MASK in self.value

    @property
    def is_long(self) -> bool:
        return len(self.value) > LONG


@dataclass(frozen=True)
class Group:
    title: str
    variables: list[Variable]


def groups(values: Mapping[str, object]) -> list[Group]:
    """The variables in groups: the known ones in their order, then others by name, then what is alone."""
    of_prefix = {prefix: title for title, prefixes in KNOWN for prefix in prefixes}
    heads = Counter(map(_head, values))
    found: dict[str, list[Variable]] = {title: [] for title, _ in KNOWN}
    for name, value in sorted(values.items()):
        head = _head(name)
        title = of_prefix.get(head) or (f"{head}_" if heads[head] >= LEAST else OTHERS)
        found.setdefault(title, []).append(Variable(name, text(value)))
    known = len(KNOWN)
    ordered = [*list(found)[:known], *sorted(list(found)[known:], key=lambda title: (title == OTHERS, title))]
    return [Group(title, found[title]) for title in ordered if found[title]]


def _head(name: str) -> str:
    return name.lstrip("_").partition("_")[0].upper()


async def show(view: View) -> Mapping[str, object]:
    outcome = await view.get("/env")
    told = outcome.object() if outcome.ok else {}
    values = dict(list(told.items())[:MAX_VARIABLES])
    words = view.words
    return {
        "outcome": outcome,
        "groups": groups(values),
        "words": words,
        "total": len(values),
        "more": len(told) - len(values),
        "hits": sum(all(word in f"{name}={text(value)}".lower() for word in words) for name, value in values.items()),
        "masked": sum(MASK in text(value) for value in values.values()),
    }


TAB = Tab("env", "Environment", 60, show, serves=("/env",))
