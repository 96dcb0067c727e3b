"""The weights of a pipeline's components by value: what each holds at the time of a call.

A pipeline may write into its weights during the call (an average of them for sampling, adapters
fused for one request), and put them back; and its user may change them after the capture. So a
weight's identity says nothing: digests of contents do, renewed where an operator writes.
"""

import dataclasses
from collections.abc import Hashable, Iterator, Mapping

import torch
from torch import Tensor

from diffopt.capture.storage_views import layout_of, storage_of
from diffopt.ir import weight_origins
from diffopt.storage.weight_digests import Sealed, digest


def named_weights(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of components with their names."""
    for name, module in modules.items():
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            yield f"{name}.{key}", tensor


@dataclasses.dataclass
class _Content:
    digest: str
    keep: Tensor  # a freed storage's identity could be another's


class WeightValues:
    """The weights of some modules by value.

    Args:
        modules: The components by name.
    """

    def __init__(self, modules: Mapping[str, torch.nn.Module]) -> None:
        self.modules = modules
        self._contents: dict[Hashable, _Content] = {}
        self._before: dict[Hashable, str] = {}
        self._live: dict[Hashable, Tensor] = {}
        self._copies: dict[Hashable, Tensor] = {}
        self._copied: set[Hashable] = set()
        self._backups: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._storages: set[int] = set()
        self._changing: set[Hashable] = set()
        self._tables: list[Mapping[str, Tensor | None]] = []

    def begin(self) -> None:
        """Begin a capture: the weights are what they are now."""
        self._contents.clear()
        self._storages.clear()
        # Walked for each write in place: to name all weights takes ten times as long.
        parts = [part for module in self.modules.values() for part in module.modules()]
        self._tables = [table for part in parts for table in (part._parameters, part._buffers)]
        self._before = {
            _place(tensor): self._digest(tensor)
            for _, tensor in named_weights(self.modules)
            if _is_plain(tensor)
        }

    def is_written(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a weight, or a view of one, and is about to be written.

        A weight may have been given other memory since `begin`.
        """
        storage = storage_of(tensor)
        return storage in self._storages or any(
            weight is not None and storage_of(weight) == storage
            for table in self._tables
            for weight in table.values()
        )

    def before_write(self, tensor: Tensor) -> None:
        """Note that a weight is about to be written: it is put back by `restore`."""
        storage = storage_of(tensor)
        for key in [key for key in self._contents if key[0] == storage]:  # type: ignore[index]
            del self._contents[key]
        if storage not in self._backups:
            whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
            whole.set_(tensor.untyped_storage())
            self._backups[storage] = whole, whole.clone()

    def restore(self) -> bool:
        """Put back what was written since `begin`.

        Returns:
            Whether the pipeline has left a weight changed, of which it had not been known: from now
            on `value` returns copies of it, since each call of the pipeline changes it again.
        """
        known = len(self._changing)
        for storage, (whole, content) in self._backups.items():
            if not torch.equal(whole, content):
                whole.copy_(content)
                self._changing.add(storage)
        if self._backups:
            self._contents.clear()
        self._backups.clear()
        return len(self._changing) > known

    def key(self, tensor: Tensor) -> Hashable:
        """Return what is equal for weights of equal types and contents."""
        if not _is_plain(tensor):
            return id(tensor), tensor._version
        return tensor.dtype, tensor.shape, tensor.stride(), self._digest(tensor)

    def value(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the weight's value now: its memory, or a copy where that is new.

        The same object for the same weight.
        """
        if not _is_plain(tensor):
            return tensor
        place, content = _place(tensor), self._digest(tensor)
        known, key = self._live, place
        alias = tensor.detach()
        if self._before.get(place) != content or storage_of(tensor) in self._changing:
            known, key = self._copies, self.key(tensor)
            alias = alias.clone(memory_format=torch.preserve_format)
            self._copied.add(place)
        if key not in known:
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            known[key] = torch.nn.Parameter(alias, requires_grad=False) if is_parameter else alias
        return known[key]

    def seal(self) -> dict[str, Sealed]:
        """Return the digest of each weight whose memory `value` has lent, by name."""
        names = {_place(tensor): name for name, tensor in named_weights(self.modules)}
        return {
            names[place]: Sealed(alias, self._before[place])
            for place, alias in self._live.items()
            if place in names
        }

    def record_origins(self) -> list[str]:
        """Say of each tensor that `value` has returned which weight of the pipeline it is.

        Of a copy, which holds what the pipeline has written, nobody knows.

        Returns:
            The names of all weights.
        """
        names = {_place(tensor): name for name, tensor in named_weights(self.modules)}
        for place, alias in self._live.items():
            if place in names and alias.is_floating_point():
                weight = weight_origins.Weight(names[place], tuple(alias.shape))
                weight_origins.record(alias, weight)
        written = frozenset(names[place] for place in self._copied if place in names)
        for copy in self._copies.values():
            weight_origins.record(copy, weight_origins.Unknown(written, tuple(copy.shape)))
        return sorted(names.values())

    def _digest(self, tensor: Tensor) -> str:
        place = _place(tensor)
        if place not in self._contents:
            self._storages.add(storage_of(tensor))
            self._contents[place] = _Content(digest({"": tensor.detach()}), tensor.detach())
        return self._contents[place].digest


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor has memory of its own; a library's subclass counts by identity."""
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta


def _place(tensor: Tensor) -> Hashable:
    return storage_of(tensor), layout_of(tensor), tensor.dtype
