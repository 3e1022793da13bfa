"""Counts of values in bins that never move, so that histograms of any units and jobs add up."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True, slots=True)
class Scale:
    """Where the bins are: the same for every histogram of one quantity, or they do not add up."""

    step: float
    """Width of a bin: in the quantity's unit, or in octaves where ``is_log``."""

    is_log: bool = False
    """Bins of equal ratio, for quantities over several orders of magnitude."""

    is_whole: bool = False
    """Each bin holds one whole number; a quantile is one of them."""

    def bin_of(self, value: float) -> int:
        """The bin a value falls in. On a logarithmic scale, values below 1e-9 count as 1e-9."""
        position = math.log2(max(value, 1e-9)) if self.is_log else value
        # Edges are exact in decimal, not in binary: 0.3 / 0.1 must not fall below 3.
        return math.floor(position / self.step + 1e-9)

    def edge(self, number: int) -> float:
        """Lower edge of a bin."""
        return float(2.0 ** (number * self.step)) if self.is_log else number * self.step


@dataclass(kw_only=True, slots=True)
class Histogram:
    """Counts by bin, and the sum of the values."""

    scale: Scale
    bins: Counter[int] = field(default_factory=Counter)
    total: float = 0.0
    """Sum of the values."""

    @property
    def count(self) -> int:
        """Values counted."""
        return self.bins.total()

    @property
    def mean(self) -> float | None:
        """Of the values themselves, not of their bins; None when there are none."""
        return self.total / self.count if self.bins else None

    def add(self, value: float) -> None:
        """Count a value."""
        self.bins[self.scale.bin_of(value)] += 1
        self.total += value

    def merge(self, other: "Histogram") -> None:
        """Add another one's counts. Raises ValueError when its bins are others."""
        if other.scale != self.scale:
            raise ValueError(f"histograms of {self.scale} and {other.scale} do not add up")
        self.bins.update(other.bins)
        self.total += other.total

    def quantile(self, share: float) -> float | None:
        """The value below which ``share`` of the values are, as exact as a bin; None without any."""
        wanted = share * self.count
        below = 0
        for number in sorted(self.bins):
            below += self.bins[number]
            if below >= wanted:
                low, high = self.scale.edge(number), self.scale.edge(number + 1)
                if self.scale.is_whole:
                    return low
                inside = 1 - (below - wanted) / self.bins[number]
                return low + (high - low) * min(1.0, max(0.0, inside))
        return None

    def columns(self, numbers: range | None = None) -> list[tuple[float, float, int]]:
        """Lower edge, upper edge and count of every bin from the first to the last, gaps too.

        Or of the bins with these numbers.
        """
        if numbers is None:
            numbers = range(min(self.bins), max(self.bins) + 1) if self.bins else range(0)
        return [(self.scale.edge(n), self.scale.edge(n + 1), self.bins.get(n, 0)) for n in numbers]

    def packed(self) -> list[float]:
        """As short JSON: sum, number of the first bin, counts from there on. Empty without any."""
        if not self.bins:
            return []
        first, last = min(self.bins), max(self.bins)
        counts = [self.bins.get(number, 0) for number in range(first, last + 1)]
        return [round(self.total, 4), first, *counts]

    @classmethod
    def unpacked(cls, scale: Scale, packed: Sequence[float]) -> Self:
        """What :meth:`packed` wrote. Raises ValueError or TypeError on anything else."""
        if not packed:
            return cls(scale=scale)
        total, first, *counts = packed
        if not counts or min(counts) < 0:
            raise ValueError("not the counts of a histogram")
        bins = {int(first) + i: int(count) for i, count in enumerate(counts) if count}
        return cls(scale=scale, bins=Counter(bins), total=float(total))
