"""Nested symbols <-> bytes: ANS over frozen integer tables that :mod:`dicmh_ray.codec.contexts` chooses.

In each pass the symbols are grouped by table, so that the coder runs over long stretches of one
table. Payload layout and arithmetic: ``schemas/layered-payload.v1.md``. Needs numpy and
constriction, not torch.
"""

from dataclasses import dataclass

import constriction
import numpy as np
import numpy.typing as npt

from dicmh_ray.codec.contexts import ContextModel, Pass, Symbols, last_nonzero_channel
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
            order, runs = _runs(step.tables)
            sorted_codes = np.empty(order.size, np.int16)
            for table, start, stop in runs:
                sorted_codes[start:stop] = coder.decode(models[table], stop - start)
            codes = np.empty(order.size, np.int16)
            codes[order] = sorted_codes
            return step.symbols(codes.reshape(step.tables.shape), middle)

        symbols = self.contexts.walk(state, parent, shape, active, visit)
        if not coder.is_empty():
            raise SymbolError(section, "bytes are left after the last symbol")
        return CodedTile(payload, symbols, _refinement(symbols, parent, active))

    def _encode_state(self, state: int, parent: Symbols | None, symbols: Symbols) -> CodedTile:
        active = active_channels(symbols, parent)
        rows, columns, channels = symbols.shape
        cells = symbols.reshape(rows * columns, channels)
        middle = num_symbols(state) // 2
        runs: list[tuple[int, npt.NDArray[np.int32]]] = []

        def visit(step: Pass) -> Symbols:
            wanted = np.take(cells[:, step.channels], step.positions, 0)
            codes = step.codes(wanted, middle)
            if codes.min() < 0 or codes.max() > 2 * middle:
                raise EncodeError(f"a symbol of state {state} is too far from its prediction")
            order, stretches = _runs(step.tables)
            sorted_codes = np.take(codes.ravel(), order).astype(np.int32)
            runs.extend((table, sorted_codes[start:stop]) for table, start, stop in stretches)
            return wanted

        self.contexts.walk(state, parent, (rows, columns), active, visit)
        coder = constriction.stream.stack.AnsCoder()
        for table, stretch in reversed(runs):
            coder.encode_reverse(stretch, self._models[state][table])
        words = coder.get_compressed().astype("<u4").tobytes()
        payload = active.to_bytes(2, "little") + words
        return CodedTile(payload, symbols, _refinement(symbols, parent, active))


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
    return last_nonzero_channel(symbols if parent is None else symbols - parent * np.int16(RATIO))


def _refinement(symbols: Symbols, parent: Symbols | None, active: int) -> bytes:
    """What a state adds in its active channels, as int8 in row, column, channel order."""
    rest = symbols[:, :, :active]
    if parent is not None:
        rest = rest - parent[:, :, :active] * np.int16(RATIO)
    return rest.astype(np.int8).tobytes()


def _runs(
    tables: npt.NDArray[np.uint16],
) -> tuple[npt.NDArray[np.intp], list[tuple[int, int, int]]]:
    """Order symbols by table, stably; and the stretches of one table: table, start, stop."""
    flat = tables.ravel()
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat)
    used = np.flatnonzero(counts)
    stops = np.cumsum(counts[used])
    starts = stops - counts[used]
    return order, list(zip(used.tolist(), starts.tolist(), stops.tolist(), strict=True))
