"""LMCache's cache engine and its storage manager behind the seam."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lmcache_api.bridge.abilities import ability
from lmcache_api.bridge.fs_chunks import load_chunks
from lmcache_api.bridge.turns import Turns
from lmcache_api.component import Backends, LayerInfo, LoadedChunks, Span, Unavailable

STORE_ID, RETRIEVE_ID = "cache_api_store", "cache_api_retrieve"
"""The request ids that LMCache's own server uses."""


class ManagerEngine:
    """The engine that a manager holds now."""

    def __init__(self, engine: Any, turns: Turns) -> None:
        self._engine = engine
        self._turns = turns

    @property
    def backends(self) -> Backends | None:
        manager = getattr(self._engine, "storage_manager", None)
        return None if manager is None else StorageManagerBackends(manager, self._turns)

    def store(self, tokens: Sequence[int]) -> None:
        store = ability(self._engine, "store")
        with self._turns.data():
            store(req_id=STORE_ID, tokens=list(tokens), **self._slots(len(tokens)))

    def retrieve(self, tokens: Sequence[int]) -> int:
        retrieve = ability(self._engine, "retrieve")
        with self._turns.data():
            mask = retrieve(req_id=RETRIEVE_ID, tokens=list(tokens), **self._slots(len(tokens)))
        return int(mask.sum().item())

    def lookup(self, tokens: Sequence[int]) -> Sequence[Span]:
        """Backends are asked without pinning, for many chunks at once: a remote one answers over the network.

        LMCache's own lookup would count it as a request.
        """
        process_tokens = ability(ability(self._engine, "token_database"), "process_tokens")
        active = ability(ability(self._engine, "storage_manager"), "get_active_storage_backends")
        only = getattr(self._engine, "retrieve_locations", None)
        layers = self._engine.num_layers if getattr(self._engine, "use_layerwise", False) else 1
        chunks = list(process_tokens(tokens=list(tokens)))
        spans: list[Span] = []
        done = 0
        while done < len(chunks):
            keys = [key for _, _, key in chunks[done:]]
            if layers > 1:
                keys = [layer_key for key in keys for layer_key in key.split_layers(layers)]
            counts = {name: backend.batched_contains(keys) // layers for name, backend in active(search_range=only)}
            found = {name: count for name, count in counts.items() if count}
            if not found:
                break
            step = min(found.values())  # as far as these backends all hold them; then they are asked again
            spans.append(Span(chunks[done][0], chunks[done + step - 1][1], step, tuple(found)))
            done += step
        return spans

    def clear(self, locations: Sequence[str] | None) -> int:
        clear = ability(self._engine, "clear")
        with self._turns.control():
            return int(clear(locations=None if locations is None else list(locations)))

    def freeze(self, frozen: bool) -> None:
        with self._turns.control():
            ability(self._engine, "freeze")(frozen)

    def is_frozen(self) -> bool:
        return bool(ability(self._engine, "is_frozen")())

    def set_hot_cache(self, enabled: bool) -> None:
        with self._turns.control():
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

    def __init__(self, manager: Any, turns: Turns) -> None:
        self._manager = manager
        self._turns = turns

    def classes(self) -> Mapping[str, str]:
        return dict(ability(self._manager, "list_backends")())

    def create(self) -> Mapping[str, str]:
        create = ability(self._manager, "create_backends")
        with self._turns.control():
            return dict(create())

    def close(self, name: str) -> bool:
        close = ability(self._manager, "close_backend")
        with self._turns.control():
            return bool(close(name))

    def recreate(self, name: str) -> Mapping[str, str] | None:
        recreate = ability(self._manager, "recreate_backend")
        with self._turns.control():
            try:
                return dict(recreate(name))
            except KeyError:
                if name in self.classes():
                    raise
                return None

    def bypassed(self) -> Sequence[str]:
        return list(ability(self._manager, "get_bypassed_backends")())

    def set_bypass(self, name: str, bypass: bool) -> bool:
        is_bypassed, set_bypass = (
            ability(self._manager, name) for name in ("is_backend_bypassed", "set_backend_bypass")
        )
        with self._turns.control():
            before = bool(is_bypassed(name))
            if before != bypass:
                set_bypass(name, bypass)
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
        # Indexed by block and offset: flattening a tensor that is not contiguous would copy all of it.
        block_size = tensor.shape[2] if len(tensor.shape) == 5 else tensor.shape[1]
        blocks, offsets = [slot // block_size for slot in slots], [slot % block_size for slot in slots]
        picked = tensor[:, blocks, offsets] if len(tensor.shape) == 5 else tensor[blocks, offsets]
        dtype = str(tensor.dtype)
        if dtype == "torch.bfloat16":
            picked = picked.float()
        elif dtype.startswith("torch.float8"):
            picked = picked.view(sys.modules["torch"].uint8)  # numpy has no such type; the bytes are the same
        data: bytes = picked.detach().cpu().contiguous().numpy().tobytes()
        return data
