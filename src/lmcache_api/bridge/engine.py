"""LMCache's cache engine and its storage manager behind the seam."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmcache_api.bridge.abilities import ability
from lmcache_api.bridge.fs_chunks import load_chunks
from lmcache_api.component import Backends, LayerInfo, LoadedChunks, Span, Unavailable

STORE_ID, RETRIEVE_ID = "cache_api_store", "cache_api_retrieve"
"""The request ids that LMCache's own server uses."""


class ManagerEngine:
    """The engine that a manager holds now.

    Stores and retrieves of ours are made one at a time, as by LMCache's own server, whose loop they hold meanwhile.
    """

    def __init__(self, engine: Any, data_lock: threading.Lock) -> None:
        self._engine = engine
        self._data_lock = data_lock

    @property
    def backends(self) -> Backends | None:
        manager = getattr(self._engine, "storage_manager", None)
        return None if manager is None else StorageManagerBackends(manager)

    def store(self, tokens: Sequence[int]) -> None:
        store = ability(self._engine, "store")
        with self._data_lock:
            store(req_id=STORE_ID, tokens=list(tokens), **self._slots(len(tokens)))

    def retrieve(self, tokens: Sequence[int]) -> int:
        retrieve = ability(self._engine, "retrieve")
        with self._data_lock:
            mask = retrieve(req_id=RETRIEVE_ID, tokens=list(tokens), **self._slots(len(tokens)))
        return int(mask.sum().item())

    def lookup(self, tokens: Sequence[int]) -> Sequence[Span]:
        """Each backend is asked for each chunk, without pinning; LMCache's own lookup would count it as a request."""
        process_tokens = ability(ability(self._engine, "token_database"), "process_tokens")
        active = ability(ability(self._engine, "storage_manager"), "get_active_storage_backends")
        only = getattr(self._engine, "retrieve_locations", None)
        spans: list[Span] = []
        for start, end, key in process_tokens(tokens=list(tokens)):
            keys = key.split_layers(self._engine.num_layers) if getattr(self._engine, "use_layerwise", False) else [key]
            where = tuple(
                name for name, backend in active(search_range=only) if all(backend.contains(k, False) for k in keys)
            )
            if not where:
                break
            last = spans[-1] if spans else None
            if last is not None and last.locations == where:
                spans[-1] = Span(last.start, end, last.chunks + 1, where)
            else:
                spans.append(Span(start, end, 1, where))
        return spans

    def clear(self, locations: Sequence[str] | None) -> int:
        return int(ability(self._engine, "clear")(locations=None if locations is None else list(locations)))

    def freeze(self, frozen: bool) -> None:
        ability(self._engine, "freeze")(frozen)

    def is_frozen(self) -> bool:
        return bool(ability(self._engine, "is_frozen")())

    def set_hot_cache(self, enabled: bool) -> None:
        ability(self._engine, "set_hot_cache")(enabled)

    def is_hot_cache_enabled(self) -> bool:
        return bool(ability(self._engine, "is_hot_cache_enabled")())

    def records_slots(self) -> bool:
        return bool(getattr(self._engine, "kvcache_check_log_enabled", False))

    def record_slots(self, enabled: bool) -> None:
        self._engine.kvcache_check_log_enabled = enabled

    def load_chunks(self, config_path: str, max_chunks: int | None, max_failed_keys: int) -> LoadedChunks:
        return load_chunks(self._engine, config_path, max_chunks, max_failed_keys)

    def _slots(self, count: int) -> Mapping[str, Any]:
        """The paged KV cache and its first slots: what LMCache's own server gives the engine."""
        torch = sys.modules.get("torch")
        if torch is None:
            raise Unavailable("this process has not loaded torch")
        caches = getattr(getattr(self._engine, "gpu_connector", None), "kvcaches", None)
        device = caches[0].device if caches else "cpu"
        return {"kvcaches": caches, "slot_mapping": torch.arange(count, dtype=torch.long, device=device)}


class StorageManagerBackends:
    """The backends of LMCache's storage manager."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def classes(self) -> Mapping[str, str]:
        return dict(ability(self._manager, "list_backends")())

    def create(self) -> Mapping[str, str]:
        return dict(ability(self._manager, "create_backends")())

    def close(self, name: str) -> bool:
        return bool(ability(self._manager, "close_backend")(name))

    def recreate(self, name: str) -> Mapping[str, str] | None:
        recreate = ability(self._manager, "recreate_backend")
        if name not in self.classes():
            return None
        return dict(recreate(name))

    def bypassed(self) -> Sequence[str]:
        return list(ability(self._manager, "get_bypassed_backends")())

    def set_bypass(self, name: str, bypass: bool) -> bool:
        before = bool(ability(self._manager, "is_backend_bypassed")(name))
        if before != bypass:
            ability(self._manager, "set_backend_bypass")(name, bypass)
        return before


class TensorKVCaches:
    """The tensors that a connector has registered with the manager."""

    def __init__(self, caches: Callable[[], Mapping[str, Any]]) -> None:
        self._caches = caches

    def layers(self) -> Mapping[str, LayerInfo]:
        return {
            name: LayerInfo(tuple(tensor.shape), str(tensor.dtype), str(tensor.device))
            for name, tensor in self._caches().items()
        }

    def slot_bytes(self, layer: str, slots: Sequence[int]) -> bytes:
        tensor = self._caches()[layer]
        shape = tuple(tensor.shape)
        index = list(slots)
        if len(shape) == 5:
            picked = tensor.reshape(shape[0], -1, *shape[3:])[:, index]
        else:
            picked = tensor.reshape(-1, *shape[2:])[index]
        dtype = str(tensor.dtype)
        if dtype == "torch.bfloat16":
            picked = picked.float()
        elif dtype.startswith("torch.float8"):
            picked = picked.view(sys.modules["torch"].uint8)  # numpy has no such type; the bytes are the same
        data: bytes = picked.detach().cpu().contiguous().numpy().tobytes()
        return data
