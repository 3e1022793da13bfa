"""Nested symbols <-> bytes: ANS over frozen integer tables that :mod:`dicmh_ray.codec.contexts` chooses.

In each pass the symbols are grouped by table, so that the coder runs over long stretches of one
table. Nearly all symbols have table 0 and equal their base: their stretch is made as a whole, and
only the exceptions in it and the busy symbols, those of other tables, are touched one by one. Payload layout and arithmetic: ``schemas/layered-payload.v1.md``. Needs numpy and
constriction, not torch.
"""

from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from dicmh_ray.codec.contexts import ContextModel, Pass, Symbols, checkerboard, last_nonzero_channel
from dicmh_ray.codec.tables import RATIO, ContextTables, Floats, num_symbols
from dicmh_ray.errors import EncodeError, SymbolError

ZERO_BELOW = 0.6
"""Values below this share of the finest step become zero. An encoder's choice, no part of the format:
a nonzero there costs more bits than its half step of error is worth (on training photographs 0.2 dB
at equal rate, for the last state)."""

MAX_SYMBOL = 32_766
"""Largest magnitude of a finest symbol: int16 holds it and the next."""


@dataclass(frozen=True, slots=True)
class CodedTile:
    """One state of one tile."""

    payload: bytes
    symbols: Symbols
    """int16 ``[i, j, C]``."""

    refinement: bytes
    """What the state's symbol checksum covers: the symbols it adds, int8, active channels only."""


class SymbolCoder:
    """Encodes and decodes the symbols of one tile, state by state."""

    def __init__(self, tables: ContextTables) -> None:
        self.tables = tables
        self.contexts = ContextModel(tables)
        # Integer weights that sum to 2**24 - n make constriction's float arithmetic exact: symbol
        # s gets the cumulative frequency sum(w[:s]) + s, that is sum(frequencies[:s]).
        self._models = [
            [
                constriction.stream.model.Categorical((row - 1).astype(np.float64), perfect=False)
                for row in table
            ]
            for table in tables.frequencies
        ]

    def encode(self, finest: Symbols) -> list[CodedTile]:
        """Encode all states of a tile.

        Args:
            finest: int16 ``[i, j, C]``: symbols of the last state, magnitudes at most 32,767.

        Returns:
            One payload for each state, coarsest first.

        Raises:
            EncodeError: a symbol of state 0 lies further from its prediction than has a code.
        """
        parent: Symbols | None = None
        coded = []
        for state, symbols in enumerate(nested_symbols(finest, self.tables.num_states)):
            coded.append(self._encode_state(state, parent, symbols))
            parent = symbols
        return coded

    def decode(
        self, state: int, parent: Symbols | None, shape: tuple[int, int], payload: bytes
    ) -> CodedTile:
        """Decode one state of a tile.

        Args:
            state: k.
            parent: int16 ``[i, j, C]``: the tile's symbols of state k-1; None for state 0.
            shape: ``(i, j)``, the cells of the tile.
            payload: what :meth:`encode` gave for this state.

        Raises:
            SymbolError: the payload cannot have been written by :meth:`encode`.
        """
        section = f"state {state}"
        if len(payload) < 2 or len(payload) % 4 != 2:
            raise SymbolError(section, f"{len(payload)} bytes are no whole number of words")
        active = int.from_bytes(payload[:2], "little")
        if active > self.tables.channels:
            raise SymbolError(section, f"{active} active channels of {self.tables.channels}")
        words = np.frombuffer(payload, "<u4", offset=2).astype(np.uint32)
        if words.size and words[-1] == 0:
            raise SymbolError(section, "the last word is zero")
        coder = constriction.stream.stack.AnsCoder(words)
        models, middle = self._models[state], num_symbols(state) // 2

        def visit(step: Pass) -> Symbols:
            symbols = step.base.copy()
            if step.busy.size < symbols.size:
                quiet = coder.decode(models[0], symbols.size - step.busy.size)
                exceptions = (quiet != middle).nonzero()[0]
                residuals = (quiet[exceptions] - middle).astype(np.int16)
                # Places among the quiet symbols -> places among all: busy ones lie before an
                # exception if no more quiet ones lie before them than before it.
                quiet_before = step.busy - np.arange(step.busy.size)
                exceptions += np.searchsorted(quiet_before, exceptions, "right")
                step.add(symbols, exceptions, residuals)
            order, runs = _runs(step.busy_tables)
            busy = np.empty(order.size, np.int16)
            for table, start, stop in runs:
                busy[order[start:stop]] = coder.decode(models[table], stop - start)
            step.add(symbols, step.busy, busy - np.int16(middle))
            return symbols

        symbols = self.contexts.walk(state, parent, shape, active, visit)
        if not coder.is_empty():
            raise SymbolError(section, "bytes are left after the last symbol")
        return CodedTile(payload, symbols, _refinement(_added(symbols, parent), active))

    def _encode_state(self, state: int, parent: Symbols | None, symbols: Symbols) -> CodedTile:
        added = _added(symbols, parent)
        active = last_nonzero_channel(added)
        rows, columns, _ = symbols.shape
        cells = checkerboard(rows, columns).arrange(symbols)
        middle = num_symbols(state) // 2
        runs: list[tuple[int, npt.NDArray[np.int32]]] = []

        def visit(step: Pass) -> Symbols:
            wanted = cells[step.rows, step.channels].copy()
            exceptions = step.exceptions(wanted)
            places = exceptions - np.searchsorted(step.busy, exceptions)
            quiet = np.full(wanted.size - step.busy.size, middle, np.int32)
            quiet[places] += step.residuals(wanted, exceptions)
            order, stretches = _runs(step.busy_tables)
            busy = step.residuals(wanted, step.busy[order]).astype(np.int32) + middle
            if state == 0:  # nested symbols differ from thrice their parents by one at most
                for codes in (quiet, busy):
                    if np.abs(codes - middle).max(initial=0) > middle:
                        raise EncodeError("a symbol of state 0 is too far from its prediction")
            if quiet.size:
                runs.append((0, quiet))
            runs.extend([(table, busy[start:stop]) for table, start, stop in stretches])
            return wanted

        self.contexts.walk(state, parent, (rows, columns), active, visit)
        coder = constriction.stream.stack.AnsCoder()
        for table, stretch in reversed(runs):
            coder.encode_reverse(stretch, self._models[state][table])
        words = coder.get_compressed().astype("<u4").tobytes()
        payload = active.to_bytes(2, "little") + words
        return CodedTile(payload, symbols, _refinement(added, active))


def round_latent(latent: Floats, step: float) -> Symbols:
    """Finest symbols of a latent: rounding, with a wider zero.

    Args:
        latent: float32 ``[..., C]``.
        step: the finest quantiser step.

    Raises:
        EncodeError: a value is not finite; it must not reach the coder.
    """
    if not np.isfinite(latent).all():
        raise EncodeError("the latent is not finite")
    scaled = latent / np.float32(step)
    rounded = np.where(np.abs(scaled) < ZERO_BELOW, np.float32(0), np.rint(scaled))
    return np.clip(rounded, -MAX_SYMBOL, MAX_SYMBOL).astype(np.int16)


def nested_symbols(finest: Symbols, num_states: int) -> list[Symbols]:
    """The symbols of every state, coarsest first, from those of the finest."""
    levels = [np.ascontiguousarray(finest, np.int16)]
    for _ in range(num_states - 1):
        levels.append((levels[-1] + np.int16(1)) // np.int16(RATIO))
    return levels[::-1]


def active_channels(symbols: Symbols, parent: Symbols | None) -> int:
    """Number of channels up to and including the last that refines its parent."""
    return last_nonzero_channel(_added(symbols, parent))


def _added(symbols: Symbols, parent: Symbols | None) -> Symbols:
    """What a state adds: its symbols less three times their parents."""
    return symbols if parent is None else symbols - parent * np.int16(RATIO)


def _refinement(added: Symbols, active: int) -> bytes:
    """What a state adds in its active channels, as int8 in row, column, channel order."""
    return added[:, :, :active].astype(np.int8).tobytes()


def _runs(
    tables: npt.NDArray[np.unsignedinteger[Any]],
) -> tuple[npt.NDArray[np.intp], list[tuple[int, int, int]]]:
    """Order symbols by table, stably; and the stretches of one table: table, start, stop."""
    order = tables.argsort(kind="stable")
    counts = np.bincount(tables)
    used = counts.nonzero()[0]
    stops = counts[used].cumsum()
    starts = stops - counts[used]
    return order, list(zip(used.tolist(), starts.tolist(), stops.tolist(), strict=True))
