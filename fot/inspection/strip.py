"""Attention mass along a memory: by position and by document."""

from collections.abc import Sequence

import numpy as np

# What ``Memory.document_runs`` gives: (document, first slot, past-the-end slot).
Runs = Sequence[tuple[str | None, int, int]]

# Positions are counted in this many equal bins.
BINS = 512


class Strip:
    """Attention mass along one memory, by memory layer; what is held does not grow with the memory.

    Attributes:
        width: slots of a bin.
        bins: (L, BINS) float64.
        documents: name -> (L,) float64; None for tokens of no named document.
    """

    def __init__(self, num_layers: int) -> None:
        self.width = 1
        self.bins = np.zeros((num_layers, BINS))
        self.documents: dict[str | None, np.ndarray] = {}

    def fit(self, length: int) -> None:
        """Let the bins reach over ``length`` slots: wide enough at first, then doubled as the memory grows."""
        if not self.bins.any():
            self.width = max(1, -(-length // BINS))
        while self.width * BINS < length:
            pairs = self.bins.reshape(len(self.bins), -1, 2).sum(-1)
            self.bins = np.concatenate([pairs, np.zeros_like(pairs)], axis=1)
            self.width *= 2

    def add(self, layer: int, slots: np.ndarray, masses: np.ndarray, runs: Runs) -> None:
        """Count masses (n,) of slots (n,); ``layer`` counts memory layers from 0."""
        self.bins[layer] += np.bincount(slots // self.width, weights=masses, minlength=BINS)
        sums = np.bincount(run_of(runs, slots), weights=masses, minlength=len(runs))
        for run in np.flatnonzero(sums).tolist():
            self.documents.setdefault(runs[run][0], np.zeros(len(self.bins)))[layer] += sums[run]


def run_of(runs: Runs, slots: np.ndarray) -> np.ndarray:
    """Which run each slot (n,) lies in."""
    return np.searchsorted([start for _, start, _ in runs], slots, side="right") - 1
