"""The integers of the entropy model: context weights, buckets, frequency tables.

They are fitted once (:mod:`dicmh_ray.codec.fitting`), frozen in the checkpoint, and never computed
again. What decoding relies on is proved from them when they are loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dicmh_ray.errors import WeightsError

Floats = npt.NDArray[np.float32]

RATIO = 3
"""Ratio of the quantiser steps of consecutive states."""

PRECISION = 1 << 24
"""Sum of the frequencies of every table."""

MAX_MAGNITUDE = 15
"""Magnitudes are clipped here before they enter a sum."""

MAX_VALUE = 511
"""Signed symbols are clipped to this magnitude before they enter a sum."""

SPREAD_LEVELS = 4096
"""The spread sum is clipped to ``[0, SPREAD_LEVELS)`` and looked up in the bucket table."""

SPREAD_UNIT = 256
"""The spread sum counts in 1/256; the networks play no part in it."""

OFFSET_UNIT = 128
"""The offset sum counts in 1/128 of a quantiser step."""

COARSEST_LIMIT = 32
"""Largest magnitude of a symbol of state 0, relative to its prediction, that has a code."""

NUM_PARENT_CLASSES = 3
"""Parent symbol zero, plus or minus one, larger."""

EXACT_LIMIT = float(1 << 24)
"""Sums of integers below this magnitude are exact in float32."""

GUESS_LIMIT = 16_384
"""A coarsest symbol's guess from near cells stays below this magnitude: with what is coded on top
of it, int16 holds it."""

MAX_DEPTH = 12
"""Most refinements of a state: they leave one cell of a tile of 64x64 for the first pass."""

WEIGHTS = (
    "spread_bias",
    "spread_parent",
    "spread_around",
    "spread_current",
    "spread_step",
    "spread_near",
    "offset_parent",
    "offset_near",
)
"""Fields of :class:`ContextTables` that sums are made with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextTables:
    """The integers of one checkpoint's entropy model; K states, C channels, R refinements at most.

    Weights are integers held as float32, ready for exact matrix products. A refinement, counted
    from the last, codes cells between four that are coded already, its near cells
    (:mod:`dicmh_ray.codec.contexts`).
    """

    spread_bias: Floats
    """``[K, C]``."""

    spread_parent: Floats
    """``[K, C, C]``: weight of the parent magnitude of channel b for channel a."""

    spread_around: Floats
    """``[K, C, C]``: weight of the parent magnitudes around, sides twice, corners once."""

    spread_current: Floats
    """``[K, C, C]``: weight of this state's magnitudes of channel b for channel a: at the same place
    where b is of an earlier group, in the near cells where it is of the same one."""

    spread_step: Floats
    """``[K, R, C]``: added in a refinement."""

    spread_near: Floats
    """``[K, R, C]``: weight of a channel's own magnitudes in the near cells, in a refinement; added
    to that in ``spread_current``."""

    offset_parent: Floats
    """``[K, C, 3]``: weights of the parent itself, its side and its corner neighbours."""

    offset_near: Floats
    """``[K, R, C]``: weight of the sum of a channel's near cells, in a refinement."""

    depths: tuple[int, ...]
    """Refinements of each state, ``0 .. R``."""

    groups: tuple[int, ...]
    """First channel of each group, and C at the end."""

    spread_buckets: npt.NDArray[np.uint8]
    """``[K, SPREAD_LEVELS]``: bucket of each clipped spread sum."""

    offset_edges: tuple[int, ...]
    """Bucket of an offset = number of edges that are at most its magnitude, in 1/128 steps."""

    frequencies: tuple[npt.NDArray[np.int32], ...]
    """For each state ``[tables, symbols]``: integer frequencies >= 1 that sum to 2**24."""

    @property
    def num_states(self) -> int:
        return len(self.frequencies)

    @property
    def channels(self) -> int:
        return int(self.spread_bias.shape[1])

    @property
    def num_spread_buckets(self) -> int:
        return int(self.spread_buckets.max()) + 1

    @property
    def num_offset_buckets(self) -> int:
        return len(self.offset_edges) + 1

    def num_tables(self) -> int:
        """Tables of one state."""
        return NUM_PARENT_CLASSES * self.num_offset_buckets * self.num_spread_buckets

    def validate(self, name: str) -> None:
        """Check every invariant that decoding relies on.

        Raises:
            WeightsError: an array has another shape than the others, a table is not a distribution,
                or a sum might not be exact.
        """
        self._check_shapes(name)
        for state, table in enumerate(self.frequencies):
            if table.shape[0] != self.num_tables() or table.min() < 1:
                raise WeightsError(name, f"state {state}: bad frequency table")
            if (table.astype(np.int64).sum(1) != PRECISION).any():
                raise WeightsError(name, f"state {state}: frequencies do not sum to 2**24")
            if table.shape[1] != num_symbols(state):
                raise WeightsError(name, f"state {state}: wrong number of symbols")
        spread = (
            np.abs(self.spread_bias)
            + MAX_MAGNITUDE * np.abs(self.spread_parent).sum(2)
            + 12 * MAX_MAGNITUDE * np.abs(self.spread_around).sum(2)
            + 4 * MAX_MAGNITUDE * np.abs(self.spread_current).sum(2)
            + (np.abs(self.spread_step) + 4 * MAX_MAGNITUDE * np.abs(self.spread_near)).max(
                1, initial=0
            )
        )
        offset = MAX_VALUE * (
            np.abs(self.offset_parent) @ np.array([1, 4, 4], np.float32)
            + 4 * np.abs(self.offset_near).max(1, initial=0)
        )
        for sums in (spread, offset):
            if not sums.max() < EXACT_LIMIT:
                raise WeightsError(name, f"context sums may reach {sums.max():.0f}, not exact")
        guess = 4 * MAX_VALUE * np.abs(self.offset_near[0]).max(initial=0) / OFFSET_UNIT
        if not guess < GUESS_LIMIT:
            raise WeightsError(name, f"guesses of state 0 may reach {guess:.0f}, too large")
        for field in WEIGHTS:
            weights = getattr(self, field)
            if not np.array_equal(weights, np.rint(weights)):
                raise WeightsError(name, f"{field} has weights that are not integers")
        if tuple(sorted(set(self.groups))) != self.groups or self.groups[:1] != (0,):
            raise WeightsError(name, f"channel groups are {self.groups}")
        if self.groups[-1] != self.channels:
            raise WeightsError(name, f"channel groups end at {self.groups[-1]}")
        if tuple(sorted(set(self.offset_edges))) != self.offset_edges:
            raise WeightsError(name, f"offset edges are {self.offset_edges}, wanted ascending ones")
        steps = self.spread_step.shape[1]
        if not all(0 <= depth <= min(steps, MAX_DEPTH) for depth in self.depths):
            raise WeightsError(name, f"depths are {self.depths}, with weights for {steps}")

    def _check_shapes(self, name: str) -> None:
        states, channels = self.spread_bias.shape if self.spread_bias.ndim == 2 else (0, 0)
        steps = self.spread_step.shape[1] if self.spread_step.ndim == 3 else 0
        wanted = {
            "spread_bias": (states, channels),
            "spread_parent": (states, channels, channels),
            "spread_around": (states, channels, channels),
            "spread_current": (states, channels, channels),
            "spread_step": (states, steps, channels),
            "spread_near": (states, steps, channels),
            "offset_parent": (states, channels, 3),
            "offset_near": (states, steps, channels),
            "spread_buckets": (states, SPREAD_LEVELS),
        }
        for field, shape in wanted.items():
            found = getattr(self, field).shape
            if found != shape or 0 in shape:
                raise WeightsError(name, f"{field} is {list(found)}, wanted {list(shape)}")
        if len(self.depths) != states:
            raise WeightsError(name, f"{len(self.depths)} depths, wanted {states}")
        if len(self.frequencies) != states:
            raise WeightsError(name, f"{len(self.frequencies)} frequency tables, wanted {states}")
        for state, table in enumerate(self.frequencies):
            if table.ndim != 2:
                raise WeightsError(name, f"frequencies_{state} is {list(table.shape)}")

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named arrays for ``tables.safetensors``, layout 2; weights as int16."""
        arrays: dict[str, npt.NDArray[Any]] = {
            name: getattr(self, name).astype(np.int16) for name in WEIGHTS
        }
        arrays["depths"] = np.array(self.depths, np.int32)
        arrays["groups"] = np.array(self.groups, np.int32)
        arrays["spread_buckets"] = self.spread_buckets
        arrays["offset_edges"] = np.array(self.offset_edges, np.int32)
        for state, table in enumerate(self.frequencies):
            arrays[f"frequencies_{state}"] = table
        return arrays

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], name: str) -> "ContextTables":
        """Rebuild and validate what :meth:`to_arrays` gave, or an earlier version's (layout 1).

        Raises:
            WeightsError: an array is missing or breaks an invariant.
        """
        try:
            if "depths" not in arrays:
                arrays = _from_first_layout(arrays)
            weights = {field: np.ascontiguousarray(arrays[field], np.float32) for field in WEIGHTS}
            tables = cls(
                **weights,
                depths=tuple(int(d) for d in arrays["depths"].reshape(-1)),
                groups=tuple(int(g) for g in arrays["groups"].reshape(-1)),
                spread_buckets=np.ascontiguousarray(arrays["spread_buckets"], np.uint8),
                offset_edges=tuple(int(e) for e in arrays["offset_edges"]),
                frequencies=tuple(
                    np.ascontiguousarray(arrays[f"frequencies_{k}"], np.int32)
                    for k in range(sum(key.startswith("frequencies_") for key in arrays))
                ),
            )
        except KeyError as exc:
            raise WeightsError(name, f"table {exc} is missing") from exc
        except (ValueError, IndexError) as exc:
            raise WeightsError(name, f"tables do not fit together: {exc}") from exc
        tables.validate(name)
        return tables


def _from_first_layout(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Layout 1, one refinement from sides alone that knows its own channel's, as layout 2 says it."""
    near = {"spread_near": arrays["spread_sides"], "offset_near": arrays["offset_sides"]}
    groups, current = arrays["groups"].reshape(-1), arrays["spread_current"]
    group = np.searchsorted(groups, np.arange(current.shape[-1]), side="right")
    return {
        **arrays,
        **{name: np.expand_dims(weights, 1) for name, weights in near.items()},
        "spread_step": np.zeros_like(arrays["spread_sides"])[:, None],
        "spread_current": current * (group[None, :] < group[:, None]),
        "depths": np.ones(len(arrays["spread_bias"]), np.int32),
    }


def num_symbols(state: int) -> int:
    """Size of the alphabet of a state: a third of the parent's cell, or a coarsest symbol."""
    return 2 * COARSEST_LIMIT + 1 if state == 0 else RATIO
