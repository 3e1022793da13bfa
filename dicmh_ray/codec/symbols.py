"""Nested symbols <-> bytes: ANS over frozen integer tables that :mod:`dicmh_ray.codec.contexts` chooses.

In each pass the symbols are coded in the order of their tables. Nearly all have table 0 and equal
their base: they are made as a whole, and only the exceptions among them and the busy symbols, those
of other tables, are touched one by one.
Payload layout and arithmetic: ``schemas/layered-payload.v2.md``. Needs numpy and constriction, not
torch.
"""

from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from dicmh_ray.codec.contexts import (
    Bytes,
    ContextModel,
    Pass,
    Symbols,
    last_nonzero_channel,
)
from dicmh_ray.codec.tables import RATIO, ContextTables, Floats, num_symbols
from dicmh_ray.errors import EncodeError, SymbolError

WORTH_OF_A_BIT = 0.025
"""A refinement of the last state is given up if its value lies so many finest steps, for each bit that
this saves, or less beyond the cell of its parent's middle. An encoder's choice, no part of the format."""

REACH_UNIT = 128
"""Reaches count in 1/128 of the finest step."""

LONG_STRETCH = 24
"""Symbols of one table that are coded faster by a call of their own than with those of others."""

MAX_SYMBOL = 32_766
"""Largest magnitude of a finest symbol: int16 holds it and the next."""


Tables = npt.NDArray[np.unsignedinteger[Any]]
"""Rows of a state's frequency tables."""


@dataclass(frozen=True, slots=True)
class RoundedLatent:
    """What there is to encode of a picture or of a tile of it."""

    symbols: Symbols
    """int16 ``[i, j, C]``: symbols of the last state, magnitudes at most 32,767."""

    reaches: Bytes
    """uint8 ``[i, j, C]``: how far each value lies from three times its parent symbol, in
    1 / :data:`REACH_UNIT` of the finest step."""


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
        self._weights = [(table - 1).astype(np.float64) for table in tables.frequencies]
        categorical = constriction.stream.model.Categorical
        self._models = [
            [categorical(row, perfect=False) for row in table] for table in self._weights
        ]
        # The same models, one for each symbol; the first is the faster encoder, the other decoder.
        self._any_encoder, self._any_decoder = categorical(perfect=False), categorical(lazy=True)
        self._least_reaches = _least_reaches(tables.frequencies[-1])

    def encode(self, latent: RoundedLatent) -> list[CodedTile]:
        """Encode all states of a tile.

        Refinements of the last state that are not worth their bits are given up: the symbols of its
        tile are what a decoder will find.

        Returns:
            One payload for each state, coarsest first.

        Raises:
            EncodeError: a symbol of state 0 lies further from its prediction than has a code.
        """
        parent: Symbols | None = None
        coded = []
        for state, symbols in enumerate(nested_symbols(latent.symbols, self.tables.num_states)):
            is_last = 0 < state == self.tables.num_states - 1
            reaches = latent.reaches if is_last else None
            coded.append(self._encode_state(state, parent, symbols, reaches))
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
            order = step.busy_tables.argsort(kind="stable")
            tables, busy = step.busy_tables[order], np.empty(order.size, np.int16)
            for stretch, table in _stretches(tables):
                if table is None:
                    weights = self._weights[state].take(tables[stretch], 0)
                    busy[stretch] = coder.decode(self._any_decoder, weights)
                else:
                    busy[stretch] = coder.decode(models[table], stretch.stop - stretch.start)
            step.add(symbols, step.busy[order], busy - np.int16(middle))
            return symbols

        symbols = self.contexts.walk(state, parent, shape, active, visit)
        if not coder.is_empty():
            raise SymbolError(section, "bytes are left after the last symbol")
        return CodedTile(payload, symbols, _refinement(_added(symbols, parent), active))

    def _encode_state(
        self, state: int, parent: Symbols | None, symbols: Symbols, reaches: Bytes | None
    ) -> CodedTile:
        """Code a state as it is, or, with the reaches, without what is not worth its bits."""
        active = last_nonzero_channel(_added(symbols, parent))
        rows, columns, _ = symbols.shape
        grid = self.contexts.order(state, (rows, columns))
        cells = grid.arrange(symbols)
        distances = None if reaches is None else grid.arrange(reaches)
        models, middle = self._models[state], num_symbols(state) // 2
        passes: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Tables]] = []

        def visit(step: Pass) -> Symbols:
            wanted = cells[step.rows, step.channels].copy()
            if distances is not None:
                self._economise(step, wanted, distances[step.rows, step.channels])
            exceptions = step.exceptions(wanted)
            places = exceptions - np.searchsorted(step.busy, exceptions)
            quiet = np.full(wanted.size - step.busy.size, middle, np.int32)
            quiet[places] += step.residuals(wanted, exceptions)
            order = step.busy_tables.argsort(kind="stable")
            busy = step.residuals(wanted, step.busy[order]).astype(np.int32) + middle
            if state == 0:  # nested symbols differ from thrice their parents by one at most
                for codes in (quiet, busy):
                    if np.abs(codes - middle).max(initial=0) > middle:
                        raise EncodeError("a symbol of state 0 is too far from its prediction")
            passes.append((quiet, busy, step.busy_tables[order]))
            return wanted

        symbols = self.contexts.walk(state, parent, (rows, columns), active, visit)
        coder = constriction.stream.stack.AnsCoder()
        for quiet, busy, tables in reversed(passes):
            for stretch, table in reversed(_stretches(tables)):
                if table is None:
                    weights = self._weights[state].take(tables[stretch], 0)
                    coder.encode_reverse(busy[stretch], self._any_encoder, weights)
                else:
                    coder.encode_reverse(busy[stretch], models[table])
            if quiet.size:
                coder.encode_reverse(quiet, models[0])
        words = coder.get_compressed().astype("<u4").tobytes()
        payload = active.to_bytes(2, "little") + words
        return CodedTile(payload, symbols, _refinement(_added(symbols, parent), active))

    def _economise(self, step: Pass, wanted: Symbols, reaches: Bytes) -> None:
        """Give up, in place, the refinements of the last state that are not worth their bits."""
        refined = (wanted != step.base).reshape(-1).nonzero()[0]
        codes = step.residuals(wanted, refined) + RATIO // 2
        least = self._least_reaches[step.tables.reshape(-1)[refined], codes]
        given_up = refined[reaches.reshape(-1)[refined] < least]
        wanted.reshape(-1)[given_up] = step.base.reshape(-1)[given_up]


def round_latent(latent: Floats, step: float) -> RoundedLatent:
    """What there is to encode of a latent.

    Args:
        latent: float32 ``[..., C]``.
        step: the finest quantiser step.

    Raises:
        EncodeError: a value is not finite; it must not reach the coder.
    """
    if not np.isfinite(latent).all():
        raise EncodeError("the latent is not finite")
    scaled = latent / np.float32(step)
    symbols = np.rint(scaled).clip(-MAX_SYMBOL, MAX_SYMBOL).astype(np.int16)
    unrefined = parent_symbols(symbols) * np.int16(RATIO)
    reaches = np.abs(scaled - unrefined) * np.float32(REACH_UNIT)
    return RoundedLatent(symbols, reaches.clip(0, 255).astype(np.uint8))


def as_rounded(symbols: Symbols) -> RoundedLatent:
    """A latent of which only the finest symbols are known, int16 ``[i, j, C]``: all are kept."""
    return RoundedLatent(symbols, np.full(symbols.shape, 255, np.uint8))


def _least_reaches(frequencies: npt.NDArray[np.int32]) -> Bytes:
    """From which reach on a refinement of the last state is worth its bits, ``[tables, codes]``."""
    bits = -np.log2(frequencies.astype(np.float64))
    saved = bits - bits[:, frequencies.shape[1] // 2, None]
    return (REACH_UNIT * (0.5 + WORTH_OF_A_BIT * saved)).clip(0, 255).astype(np.uint8)


def nested_symbols(finest: Symbols, num_states: int) -> list[Symbols]:
    """The symbols of every state, coarsest first, from those of the finest."""
    levels = [np.ascontiguousarray(finest, np.int16)]
    for _ in range(num_states - 1):
        levels.append(parent_symbols(levels[-1]))
    return levels[::-1]


def parent_symbols(symbols: Symbols) -> Symbols:
    """The symbols of the next coarser state."""
    parents: Symbols = (symbols + np.int16(1)) // np.int16(RATIO)
    return parents


def active_channels(symbols: Symbols, parent: Symbols | None) -> int:
    """Number of channels up to and including the last that refines its parent."""
    return last_nonzero_channel(_added(symbols, parent))


def _added(symbols: Symbols, parent: Symbols | None) -> Symbols:
    """What a state adds: its symbols less three times their parents."""
    return symbols if parent is None else symbols - parent * np.int16(RATIO)


def _refinement(added: Symbols, active: int) -> bytes:
    """What a state adds in its active channels, as int8 in row, column, channel order."""
    return added[:, :, :active].astype(np.int8).tobytes()


def _stretches(tables: Tables) -> list[tuple[slice, int | None]]:
    """Cut symbols in the order of their tables: their places, and the table, if one and long."""
    counts = np.bincount(tables)
    stops = counts.cumsum()
    stretches: list[tuple[slice, int | None]] = []
    start = 0
    for table in (counts >= LONG_STRETCH).nonzero()[0].tolist():
        stop = int(stops[table])
        first = stop - int(counts[table])
        if first > start:
            stretches.append((slice(start, first), None))
        stretches.append((slice(first, stop), table))
        start = stop
    if start < tables.size:
        stretches.append((slice(start, tables.size), None))
    return stretches
