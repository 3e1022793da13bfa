"""Feed mutated bitstreams to the decoder: ``python jobs/fuzz_streams.py [--layout 1]``.

Every golden stream of a payload layout is cut at every byte and has a bit flipped in every byte; then come random
damage, splices, noise, and streams whose checksums were made good again after the damage, so that
it reaches the tags, the sizes and the symbol decoder. Allowed are the documented errors, and a
result only where the bytes are those of a valid stream or every checksum was forged.

The cases run in a child process whose address space is limited, so that a native crash, a hang or
a large allocation is seen, and named by its number: ``--only NUMBER`` runs one again.
"""

import argparse
import json
import mmap
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dicmh_ray import ImageCodec, load_codec
from dicmh_ray.bench import describe_environment
from dicmh_ray.bitstream import crc32c, parse_bitstream, prefix_bytes
from dicmh_ray.errors import BitstreamError, CodecMismatchError

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
LAYOUTS = {1: ("bitstream_v1", "checkpoint"), 2: ("layered_payload_v2", "checkpoint_v2")}
"""Folders of each payload layout's streams and of the checkpoint that wrote them."""

MAX_CASE_S = 2.0
"""Processor time of one case."""

MAX_STALL_S = 300.0
"""Wall-clock time without a finished case after which the child is taken for hung."""

MEMORY_BYTES = 256 * 2**20
"""What decoding may add to the child's address space: the streams declare at most 4 megapixels."""

MAX_FORGED_PX = 2**22
"""Forged sizes above are reduced: a picture costs what its size says, which is no fault."""

FIXED_BYTES = 21
WIDTH_AT, TAGS_LENGTH_AT = 14, 19


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is run."""

    cases: int
    """Random cases beside the exhaustive ones."""

    stride: int
    """Of the exhaustive cases, every so many-th; 1 is all."""

    seed: int

    layout: int
    """Of the streams' payloads."""

    only: int | None


@dataclass(frozen=True, slots=True)
class Case:
    """A mutated stream."""

    number: int
    kind: str
    data: bytes
    is_forged: bool = False
    """Every checksum of the frame is right: a decode to other symbols is no fault."""


def main() -> None:
    """Run the child, watch it, print what it found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=20_000, help="random cases")
    parser.add_argument("--stride", type=int, default=1, help="of the exhaustive cases")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--layout", type=int, choices=sorted(LAYOUTS), default=max(LAYOUTS), help="of the payloads"
    )
    parser.add_argument("--only", type=int, help="run one case and print its bytes")
    parser.add_argument("--child", metavar="FILE", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    child = given.pop("child")
    options = Options(**given)
    if child is not None:
        run_cases(options, Path(child))
        return
    with tempfile.TemporaryDirectory(prefix="dicmh-fuzz-") as folder:
        marker = Path(folder, "marker")
        marker.write_bytes(bytes(8))
        ending, result = watch(marker)
    failures = print_result(options, ending, result)
    sys.exit(1 if failures else 0)


def watch(marker: Path) -> tuple[str, dict[str, Any]]:
    """Run the child to its end; how it ended, and what it reported."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", str(marker)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    last, since = b"", time.monotonic()
    while True:
        try:
            out, _ = process.communicate(timeout=1)
            break
        except subprocess.TimeoutExpired:
            now = marker.read_bytes()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > MAX_STALL_S:
                process.kill()
                process.communicate()
                return f"hung in case {int.from_bytes(now, 'little')}", {}
    if process.returncode:
        number = int.from_bytes(marker.read_bytes(), "little")
        return f"died with {process.returncode} in case {number}", {}
    return "", json.loads(out)


def run_cases(options: Options, marker: Path) -> None:
    """The child: decode every case under the limits, print JSON."""
    written, checkpoint = (GOLDEN / folder for folder in LAYOUTS[options.layout])
    codec = load_codec(checkpoint, device="cpu", threads=1)
    streams = [path.read_bytes() for path in sorted(written.glob("*.dicm"))]
    prefixes = {data[:end] for data in streams for end in prefix_bytes(data)}
    for data in streams:
        codec.decode_latent([data])
    limit = address_space_bytes() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counts: dict[str, Counter[str]] = {}
    faults: list[str] = []
    slowest_s, slowest = 0.0, 0
    with marker.open("r+b") as file, mmap.mmap(file.fileno(), 8) as note:
        for case in make_cases(streams, options):
            if options.only is not None and case.number != options.only:
                continue
            note[:] = case.number.to_bytes(8, "little")
            started = time.process_time()
            outcome, is_fault = decode_case(codec, case, prefixes)
            seconds = time.process_time() - started
            if seconds > MAX_CASE_S:
                outcome, is_fault = f"took {seconds:.1f} s", True
            if seconds > slowest_s:
                slowest_s, slowest = seconds, case.number
            counts.setdefault(case.kind, Counter())[outcome] += 1
            if is_fault or options.only is not None:
                faults.append(f"case {case.number} ({case.kind}): {outcome}: {case.data.hex()}")
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
    report = {
        "counts": counts,
        "faults": faults,
        "slowest_s": slowest_s,
        "slowest": slowest,
        "growth_bytes": growth * 1024,
    }
    sys.stdout.write(json.dumps(report))


def decode_case(codec: ImageCodec, case: Case, prefixes: set[bytes]) -> tuple[str, bool]:
    """What came of a case, and whether that is a fault of the decoder."""
    try:
        latent = codec.decode_latent([case.data])[0]
    except (BitstreamError, CodecMismatchError) as exc:
        return type(exc).__name__, False
    except Exception as exc:  # noqa: BLE001  an error that is not documented is what is looked for
        return f"{type(exc).__name__}: {exc}", True
    if case.data in prefixes:
        return "valid", False
    if not case.is_forged:
        return "decoded damaged bytes", True
    header = parse_bitstream(case.data).header
    shape = (codec.latent_channels, -(-header.height // 16), -(-header.width // 16))
    if latent.shape != shape or not np.isfinite(latent).all():
        return f"latent of shape {latent.shape}, wanted {shape}", True
    return "other symbols", False


def make_cases(streams: list[bytes], options: Options) -> Iterator[Case]:
    """Every case, in order; a random one depends on the seed and its number alone."""
    number = 0
    for data in streams:
        for at in range(0, len(data), options.stride):
            yield Case(number, "cut at every byte", data[:at])
            number += 1
            flipped = bytearray(data)
            flipped[at] ^= 1 << (at + options.seed) % 8
            yield Case(number, "bit flipped in every byte", bytes(flipped))
            number += 1
    makers = (flips, overwrites, splices, noise, resealed, resealed, resealed, forged_payload)
    for k in range(options.cases):
        chance = np.random.default_rng((options.seed, number))
        kind, data, is_forged = makers[k % len(makers)](streams, chance)
        yield Case(number, kind, data, is_forged)
        number += 1


Made = tuple[str, bytes, bool]


def flips(streams: list[bytes], chance: np.random.Generator) -> Made:
    """A few flipped bits anywhere."""
    data = bytearray(pick(streams, chance))
    flip_bits(data, 0, len(data), int(chance.integers(2, 17)), chance)
    return "flipped bits", bytes(data), False


def overwrites(streams: list[bytes], chance: np.random.Generator) -> Made:
    """A stretch replaced, removed or put in."""
    data = pick(streams, chance)
    at, length = int(chance.integers(len(data))), int(chance.integers(1, 40))
    middle = (chance.bytes(length), b"", bytes(length))[int(chance.integers(3))]
    skipped = length if chance.integers(2) else 0
    return "stretch changed", data[:at] + middle + data[at + skipped :], False


def splices(streams: list[bytes], chance: np.random.Generator) -> Made:
    """The head of one stream and the tail of another, or one twice."""
    one, other = pick(streams, chance), pick(streams, chance)
    head, tail = int(chance.integers(len(one))), int(chance.integers(len(other)))
    return "spliced", one[:head] + other[tail:], False


def noise(streams: list[bytes], chance: np.random.Generator) -> Made:
    """Random bytes, alone or behind the start of a stream."""
    head = pick(streams, chance)[: (0, 4, 5, FIXED_BYTES)[int(chance.integers(4))]]
    return "random bytes", head + chance.bytes(int(chance.integers(400))), False


def resealed(streams: list[bytes], chance: np.random.Generator) -> Made:
    """Damage anywhere or in the header, and every checksum of the frame made good again."""
    data = bytearray(pick(streams, chance))
    end = len(data) if chance.integers(2) else min(len(data), FIXED_BYTES + 30)
    if chance.integers(3):
        flip_bits(data, 5, end, int(chance.integers(1, 9)), chance)
    else:
        at = int(chance.integers(5, end))
        data[at : at + 8] = chance.bytes(len(data[at : at + 8]))
    width, height = struct.unpack_from("<HH", data, WIDTH_AT)
    if width * height > MAX_FORGED_PX:
        struct.pack_into("<HH", data, WIDTH_AT, width % 2048, height % 2048)
    return "checksums forged", reseal(bytes(data)), True


def forged_payload(streams: list[bytes], chance: np.random.Generator) -> Made:
    """Payloads alone are damaged, cut or replaced: what the symbol decoder must bear."""
    data = pick(streams, chance)
    stream = parse_bitstream(data)
    out = bytearray(data[: header_bytes(data)])
    chosen = int(chance.integers(len(stream.states)))
    for k, state in enumerate(stream.states):
        payload = bytearray(state.payload)
        if k == chosen and payload:
            match int(chance.integers(4)):
                case 0:
                    flip_bits(payload, 0, len(payload), int(chance.integers(1, 9)), chance)
                case 1:
                    payload[2:] = chance.bytes(4 * int(chance.integers(0, 60)))
                case 2:
                    del payload[2 + 4 * int(chance.integers(len(payload) // 4 + 1)) :]
                case _:
                    payload += chance.bytes(4 * int(chance.integers(1, 9)))
        out += len(payload).to_bytes(4, "little") + payload
        out += state.symbol_crc.to_bytes(4, "little") + bytes(4)
    return "payloads forged", reseal(bytes(out)), True


def pick(streams: list[bytes], chance: np.random.Generator) -> bytes:
    """Any of the streams, the short ones as often as the long ones."""
    return streams[int(chance.integers(len(streams)))]


def flip_bits(
    data: bytearray, start: int, stop: int, count: int, chance: np.random.Generator
) -> None:
    """Flip ``count`` random bits of a stretch."""
    for at in chance.integers(start, stop, count).tolist():
        data[at] ^= 1 << int(chance.integers(8))


def header_bytes(data: bytes) -> int:
    """Length of a stream's header with its tags and checksum."""
    return FIXED_BYTES + int.from_bytes(data[TAGS_LENGTH_AT:FIXED_BYTES], "little") + 4


def reseal(data: bytes) -> bytes:
    """The same bytes with right checksums, as far as their lengths make sense."""
    out, pos = bytearray(data), header_bytes(data)
    if pos > len(out):
        return data
    crc = crc32c(bytes(out[: pos - 4]))
    out[pos - 4 : pos] = crc.to_bytes(4, "little")
    while pos + 12 <= len(out):
        end = pos + 12 + int.from_bytes(out[pos : pos + 4], "little")
        if end > len(out):
            break
        crc = crc32c(bytes(out[pos : end - 4]), crc)
        out[end - 4 : end] = crc.to_bytes(4, "little")
        pos = end
    return bytes(out)


def address_space_bytes() -> int:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def print_result(options: Options, ending: str, result: dict[str, Any]) -> int:
    """The table, and how many faults there are."""
    for line in describe_environment(
        f"python jobs/{' '.join([Path(__file__).name, *sys.argv[1:]])}"
    ).lines():
        print(line)
    if ending:
        print(f"FAULT: the decoder {ending}; seed {options.seed}")
        return 1
    total = 0
    for kind, outcomes in result["counts"].items():
        cases = sum(outcomes.values())
        total += cases
        listed = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
        print(f"{kind:26} {cases:6}  {listed}")
    for fault in result["faults"][:20]:
        print(fault)
    faults = len(result["faults"]) if options.only is None else 0
    print(
        f"{total} cases, seed {options.seed}: {faults} faults, no crash, no hang; "
        f"slowest {1000 * result['slowest_s']:.0f} ms (case {result['slowest']}), "
        f"memory grew by {result['growth_bytes'] / 2**20:.1f} MiB of {MEMORY_BYTES / 2**20:.0f} allowed"
    )
    return faults


if __name__ == "__main__":
    main()
