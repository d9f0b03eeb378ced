"""Keys and values of the local window in one layer, which grow in place."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

SPARE = 64  # slots made at a time: a window is copied once for so many generated tokens

# Forks of a window share its room, and threads may go on with them at once: one of them may use what is free.
_TAKING = threading.Lock()


@dataclass
class Room:
    """Where keys and values are written, one behind the other; a slot is written once.

    Attributes:
        keys: (B, G, capacity, D).
        values: likewise.
        used: slots that are written, by whoever shares this.
    """

    keys: Tensor
    values: Tensor
    used: int

    def begins(self, keys: Tensor, values: Tensor) -> bool:
        """Whether these are what it begins with."""
        pairs = ((self.keys, keys), (self.values, values))
        return all(
            mine.data_ptr() == one.data_ptr() and mine.stride() == one.stride() and len(mine) == len(one)
            for mine, one in pairs
        )

    def take(self, start: int, stop: int) -> bool:
        """Whether the slots from ``start`` on were free; then they are the caller's."""
        with _TAKING:
            free = self.used == start and stop <= self.keys.shape[2]
            if free:
                self.used = stop
            return free


class WindowLayer(DynamicLayer):
    """As ``DynamicLayer``, without a copy of the window for each new token.

    ``keys`` and ``values`` are views of the first slots of a room. A copy of this object shares the room. Nothing that
    one of them sees is written to again: who comes second to the free slots moves to a room of its own.
    """

    keys: Tensor  # (B, G, S, D)
    values: Tensor
    _room: Room | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Take in (B, G, T, D) keys and values; returns all, (B, G, S, D)."""
        start = self.get_seq_length()
        tracked = (self.keys, self.values, key_states, value_states)
        if not start or any(one.requires_grad for one in tracked):
            return super().update(key_states, value_states, *args, **kwargs)
        stop = start + key_states.shape[2]
        room = self._room
        if room is None or not room.begins(self.keys, self.values) or not room.take(start, stop):
            room = self._room = Room(_roomy(self.keys, stop), _roomy(self.values, stop), stop)
        # ``data``: what autograd has saved of the slots before stays valid.
        room.keys.data[:, :, start:stop] = key_states
        room.values.data[:, :, start:stop] = value_states
        self.keys, self.values = room.keys[:, :, :stop], room.values[:, :, :stop]
        return self.keys, self.values


def _roomy(vectors: Tensor, stop: int) -> Tensor:
    """These vectors (B, G, S, D) in room for ``stop`` and some more."""
    batch, heads, size, dim = vectors.shape
    with torch.inference_mode(False):  # room made in inference mode could not be written to outside it
        room = torch.empty(batch, heads, stop + SPARE, dim, dtype=vectors.dtype, device=vectors.device)
    room.data[:, :, :size] = vectors
    return room
