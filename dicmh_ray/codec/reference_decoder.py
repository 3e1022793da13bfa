"""Reference decoder of bitstream v1 with the layered coder: bytes -> symbols -> dequantised latent.

One file, numpy only, written to be read: it travels with every archive so that the latents can be
recovered without this package. It follows schemas/bitstream.v1.md and layered-payload.v2.md step by
step in 64-bit integers, several hundred times slower than the package, and checks every checksum.
Payloads of version 1 are those of version 2 with other tables (:func:`as_second_layout`).

    python reference_decoder.py CHECKPOINT_DIR STREAM OUT.npy [STATES]

writes the latent, float32 [C, h, w]: symbols of the last state times its quantiser step.
"""

import itertools
import json
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

CODERS = ("layered/1", "layered/2")
RATIO, PRECISION_BITS, TILE, CELL = 3, 24, 64, 16
MAX_MAGNITUDE, MAX_VALUE, SPREAD_LEVELS, OFFSET_UNIT, COARSEST_LIMIT = 15, 511, 4096, 128, 32


def crc32c(data: bytes, value: int = 0) -> int:
    """CRC-32C (Castagnoli), bit by bit."""
    value ^= 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 & -(value & 1))
    return value ^ 0xFFFFFFFF


def read_safetensors(path: str | Path) -> dict[str, Any]:
    data = Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    types = {"I16": "<i2", "I32": "<i4", "U8": "u1"}
    arrays = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            raw = np.frombuffer(data[8 + length + start : 8 + length + stop], types[entry["dtype"]])
            arrays[name] = raw.reshape(entry["shape"]).astype(np.int64)
    return arrays


def read_frame(data: bytes) -> tuple[str, int, int, list[tuple[bytes, int]]]:
    """Header and the (payload, symbol checksum) of each state that the bytes hold."""
    magic, version, _, codec, width, height, _, tags = struct.unpack_from("<4sBB8sHHBH", data)
    if magic != b"DICM" or version != 1:
        raise SystemExit("not a version 1 bitstream")
    position, start, crc, states = 21 + tags, 0, 0, []
    while True:
        crc = crc32c(data[start:position], crc)  # of everything before, less the earlier CRCs
        if crc != struct.unpack_from("<I", data, position)[0]:
            raise SystemExit(f"damaged before byte {position}")
        start = position + 4
        if start == len(data):
            break
        (length,) = struct.unpack_from("<I", data, start)
        position = start + 4 + length + 4
        (symbol_crc,) = struct.unpack_from("<I", data, position - 4)
        states.append((data[start + 4 : start + 4 + length], symbol_crc))
    return codec.hex(), width, height, states


class Ans:
    """Stack coder: 64-bit state, 32-bit words, 24-bit probabilities."""

    def __init__(self, payload: bytes) -> None:
        self.words = list(struct.unpack(f"<{len(payload) // 4}I", payload))
        self.state = 0
        while self.words and self.state < 1 << 32:
            self.state = self.state << 32 | self.words.pop()

    def decode(self, frequencies: list[int]) -> int:
        quantile = self.state & ((1 << PRECISION_BITS) - 1)
        symbol = left = 0
        while quantile >= left + frequencies[symbol]:
            left += frequencies[symbol]
            symbol += 1
        frequency = frequencies[symbol]
        self.state = (self.state >> PRECISION_BITS) * frequency + quantile - left
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return symbol


def sides_and_corners(values: Any) -> tuple[Any, Any]:
    p = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    sides = p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:]
    corners = p[:, :-2, :-2] + p[:, :-2, 2:] + p[:, 2:, :-2] + p[:, 2:, 2:]
    return sides, corners


def as_second_layout(tables: dict[str, Any]) -> dict[str, Any]:
    """Tables of layout 1, which have one refinement, from sides of the same channel, as layout 2."""
    if "depths" in tables:
        return tables
    states, channels = tables["spread_bias"].shape
    group = np.searchsorted(tables["groups"], np.arange(channels), side="right")
    return {
        **tables,
        "depths": np.ones(states, np.int64),
        "spread_current": tables["spread_current"] * (group < group[:, None]),
        "spread_step": np.zeros((states, 1, channels), np.int64),
        "spread_near": tables["spread_sides"][:, None],
        "offset_near": tables["offset_sides"][:, None],
    }


def refinement(i: int, j: int, depth: int) -> int:
    """In which refinement, counted from the last, a cell is coded; ``depth`` if before all."""
    if not i | j:
        return depth
    lowest = (i | j) & -(i | j)
    is_middle = bool(i & lowest and j & lowest)
    return min(2 * (lowest.bit_length() - 1) + is_middle, depth)


def near_sums(values: Any, step: int) -> Any:
    """Sums over the four near cells of a refinement, zero beyond the edge; [C, rows, columns]."""
    d = 1 << step // 2
    rows, columns = values.shape[1:]
    p = np.pad(values, ((0, 0), (d, d), (d, d)))
    ways = ((0, 0), (0, 2), (2, 0), (2, 2)) if step % 2 else ((0, 1), (2, 1), (1, 0), (1, 2))
    return sum(p[:, a * d : a * d + rows, b * d : b * d + columns] for a, b in ways)


def decode_tile(
    tables: dict[str, Any], state: int, parent: Any, payload: bytes
) -> tuple[Any, bytes]:
    """Symbols int64 [C, rows, columns] of one state of one tile."""
    t, (rows, columns) = as_second_layout(tables), parent.shape[1:]
    channels = t["spread_bias"].shape[1]
    active = struct.unpack_from("<H", payload)[0]
    coder = Ans(payload[2:])
    current = RATIO * parent
    current[:active] = 0
    magnitude = np.minimum(np.abs(parent), MAX_MAGNITUDE)
    sides, corners = sides_and_corners(magnitude)
    spread = t["spread_bias"][state][:, None, None] + np.tensordot(
        t["spread_parent"][state], magnitude, 1
    )
    spread = spread + np.tensordot(t["spread_around"][state], 2 * sides + corners, 1)
    value = RATIO * np.clip(parent, -(MAX_VALUE // 3), MAX_VALUE // 3)
    sides, corners = sides_and_corners(value)
    w = t["offset_parent"][state][:, :, None, None]
    offset = w[:, 0] * value + w[:, 1] * sides + w[:, 2] * corners
    buckets = int(t["spread_buckets"].max()) + 1
    edges = t["offset_edges"]
    alphabet = 2 * COARSEST_LIMIT + 1 if state == 0 else RATIO
    groups = t["groups"].tolist()
    for first, last in itertools.pairwise(groups):
        last = min(last, active)
        if first >= last:
            break
        earlier = np.minimum(np.abs(current[:first]), MAX_MAGNITUDE)
        group = spread[first:last] + np.tensordot(
            t["spread_current"][state][first:last, :first], earlier, 1
        )
        depth = int(t["depths"][state])
        for step in reversed(range(depth + 1)):
            if step < depth:
                near = near_sums(np.clip(current, -MAX_VALUE, MAX_VALUE), step)
                near_magnitude = near_sums(np.minimum(np.abs(current), MAX_MAGNITUDE), step)
                beside = np.tensordot(
                    t["spread_current"][state][first:last, first:last],
                    near_magnitude[first:last],
                    1,
                )
            coded: list[tuple[Any, ...]] = []
            for c in range(first, last):
                for i in range(rows):
                    for j in range(columns):
                        if refinement(i, j, depth) != step:
                            continue
                        level = group[c - first, i, j]
                        place = offset[c, i, j]
                        if step < depth:
                            level += t["spread_step"][state, step, c] + beside[c - first, i, j]
                            level += t["spread_near"][state, step, c] * near_magnitude[c, i, j]
                            place += t["offset_near"][state, step, c] * near[c, i, j]
                        up = parent[c, i, j]
                        base = (place + OFFSET_UNIT // 2) // OFFSET_UNIT if state == 0 else 3 * up
                        shift = place - OFFSET_UNIT * base
                        bucket = int((abs(shift) >= edges).sum())
                        bucket += (len(edges) + 1) * min(abs(up), 2)
                        level = min(max(level, 0), SPREAD_LEVELS - 1)
                        table = buckets * bucket + t["spread_buckets"][state][level]
                        coded.append((table, i, j, c, base, -1 if shift < 0 else 1))
            for table, i, j, c, base, sign in sorted(coded):
                symbol = coder.decode(t[f"frequencies_{state}"][table].tolist())
                current[c, i, j] = base + sign * (symbol - alphabet // 2)
    if coder.words or coder.state:
        raise SystemExit(f"state {state}: bytes are left after the last symbol")
    added = (current - RATIO * parent)[:active].transpose(1, 2, 0).astype(np.int8).tobytes()
    if channels < active:
        raise SystemExit(f"state {state}: {active} active channels")
    return current, added


def decode_symbols(
    checkpoint: str | Path, data: bytes, wanted: int | None = None
) -> tuple[dict[str, Any], Any, int]:
    """Config and symbols int64 [C, h, w] of the last wanted state, and the number of states."""
    config = json.loads((Path(checkpoint) / "config.json").read_text())
    if config.get("coder") not in CODERS:
        known = " and ".join(CODERS)
        raise SystemExit(f"payloads are {config.get('coder')!r}, this decoder reads {known}")
    tables = read_safetensors(Path(checkpoint) / "tables.safetensors")
    _, width, height, states = read_frame(data)
    rows, columns = -(-height // CELL), -(-width // CELL)
    tiles = [(i, j) for i in range(0, rows, TILE) for j in range(0, columns, TILE)]
    channels = tables["spread_bias"].shape[1]
    symbols = np.zeros((channels, rows, columns), np.int64)
    states = states[:wanted]
    for state, (payload, symbol_crc) in enumerate(states):
        lengths = struct.unpack_from(f"<{len(tiles) - 1}I", payload)
        position, crc = 4 * len(lengths), 0
        for (i, j), length in zip(tiles, [*lengths, len(payload)], strict=True):
            part = payload[position : position + length]
            position += length
            area = np.s_[:, i : i + TILE, j : j + TILE]
            parent = symbols[area].copy()
            tile, added = decode_tile(tables, state, parent, part)
            symbols[area] = tile
            crc = crc32c(added, crc)
        if crc != symbol_crc:
            raise SystemExit(f"state {state}: symbols do not match their checksum")
    return config, symbols, len(states)


def main(checkpoint: str, stream: str, out: str, wanted: str | None = None) -> None:
    config, symbols, count = decode_symbols(
        checkpoint, Path(stream).read_bytes(), int(wanted) if wanted else None
    )
    network = config["network"]
    step = network["finest_step"] * RATIO ** (network["num_states"] - count)
    np.save(out, (symbols * step).astype(np.float32))


if __name__ == "__main__":
    main(*sys.argv[1:])
