"""Flip a bit in every byte of an archive; verify must name it: ``python jobs/check_damage.py``.

A small archive is made of one row of each status, one of them with a stream of the golden set.
Then, object by object and byte by byte, one bit is flipped, the archive is verified, and the byte
restored. Each flip must be found in the object it was made in; a flip in a blob must be pinned to
its row. Then every object is cut at many lengths, and removed.
"""

import argparse
import hashlib
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from dicmh_ray.archive import (
    EncodedImage,
    Plan,
    Store,
    create_archive,
    open_snapshot,
    open_store,
    verify_archive,
)
from dicmh_ray.bench import describe_environment
from dicmh_ray.bitstream import parse_bitstream

ROOT = Path(__file__).resolve().parents[1]
STREAMS = ROOT / "tests" / "golden" / "bitstream_v1"
CODEC_ID = "5e" * 32
CUTS = 16


@dataclass(kw_only=True, slots=True)
class Finding:
    """What came of the damage to the objects of one kind."""

    objects: int = 0
    flips: int = 0
    found: int = 0
    named: int = 0
    blob_flips: int = 0
    rows_named: int = 0
    cuts: int = 0
    cuts_found: int = 0
    missed: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Where a blob of a row lies in its part."""

    start: int
    stop: int
    key: str


def main() -> None:
    """Make the archive, damage it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stride", type=int, default=1, help="every so many-th byte only")
    stride = parser.parse_args().stride
    uri = "memory://check-damage/archive"
    make_archive(uri)
    store = open_store(uri)
    spans = blob_spans(uri, store)
    findings: dict[str, Finding] = {}
    if verify_archive(uri).exit_code != 0:
        sys.exit("the undamaged archive does not verify")
    for name in store.list(""):
        finding = findings.setdefault(kind_of(name), Finding())
        finding.objects += 1
        flip_every_byte(uri, store, name, spans.get(name, []), stride, finding)
        cut_and_remove(uri, store, name, finding)
    if verify_archive(uri).exit_code != 0:
        sys.exit("the restored archive does not verify")
    sys.exit(print_result(findings))


def make_archive(uri: str) -> None:
    """One unit: the stream of a real image, a kept original, a failed image."""
    plan = Plan(
        units=[{"name": "000000", "uri": "000000.tar"}],
        codec_id=CODEC_ID,
        parameters={"keep_original": "below-floor"},
    )
    files = {"config.json": b'{"format": "test"}', "weights.safetensors": bytes(range(256))}
    writer = create_archive(uri, plan=plan, codec_files=files)
    kept = hashlib.shake_128(b"original").digest(500)
    writer.commit_unit(
        "000000",
        [
            stream_row("grey"),
            EncodedImage(key="failed", status="failed", error="unreadable", source_uri="0.tar"),
            EncodedImage(
                key="kept",
                status="kept_original",
                error="unsupported: alpha",
                tier="original",
                original=kept,
                original_sha256=hashlib.sha256(kept).hexdigest(),
                original_bytes=len(kept),
                source_uri="000000.tar",
            ),
        ],
        info={},
    )
    writer.finalize()


def stream_row(name: str) -> EncodedImage:
    """A row that holds a golden stream."""
    data = (STREAMS / f"{name}.dicm").read_bytes()
    stream = parse_bitstream(data)
    width, height, ends = stream.header.width, stream.header.height, stream.prefix_bytes
    return EncodedImage(
        key=name,
        status="ok",
        tags=stream.tags,
        width=width,
        height=height,
        bpp=8 * len(data) / (width * height),
        tier="faithful",
        psnr=31.0,
        worst_tile_psnr=25.0,
        num_states=len(ends),
        source_uri="000000.tar",
        original_sha256=hashlib.sha256(name.encode()).hexdigest(),
        original_bytes=9000,
        original_format="JPEG",
        metadata='{"cls": 3}',
        prefix_bytes=ends,
        base=data[: ends[1]],
        detail=data[ends[1] :],
    )


def blob_spans(uri: str, store: Store) -> dict[str, list[Span]]:
    """Part -> where its blobs lie, from the row index."""
    snapshot = open_snapshot(uri)
    spans: dict[str, list[Span]] = {}
    for part in snapshot.parts:
        data = store.get(part.name)
        rows = [row for table in snapshot.read_indexes() for row in table.to_pylist()]
        for row in rows:
            for blob in ("base", "detail", "original"):
                start, length = row[f"{blob}_offset"], row[f"{blob}_length"]
                if row["part"] == part.name and length and start + length <= len(data):
                    span = Span(start=start, stop=start + length, key=row["key"])
                    spans.setdefault(part.name, []).append(span)
    return spans


def flip_every_byte(
    uri: str, store: Store, name: str, spans: list[Span], stride: int, finding: Finding
) -> None:
    """One flip at a time, all of them."""
    data = store.get(name)
    for at in range(0, len(data), stride):
        store.put(name, data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        problems = verify_archive(uri).problems
        finding.flips += 1
        finding.found += bool(problems)
        is_named = any(problem.name == name for problem in problems)
        finding.named += is_named
        if not is_named:
            finding.missed.append(f"{name} byte {at}")
        keys = [span.key for span in spans if span.start <= at < span.stop]
        if keys:
            finding.blob_flips += 1
            finding.rows_named += [p.key for p in problems if p.row is not None] == keys
    store.put(name, data)


def cut_and_remove(uri: str, store: Store, name: str, finding: Finding) -> None:
    """Shorter by something between one byte and all, then gone."""
    data = store.get(name)
    lengths = sorted({len(data) * k // CUTS for k in range(CUTS)} | {len(data) - 1})
    for length in lengths:
        store.put(name, data[:length])
        finding.cuts += 1
        finding.cuts_found += any(p.name == name for p in verify_archive(uri).problems)
    store.delete(name)
    finding.cuts += 1
    finding.cuts_found += any(p.name == name for p in verify_archive(uri).problems)
    store.put(name, data)


def kind_of(name: str) -> str:
    """Folder of an object, or its own name at top level."""
    return name.partition("/")[0]


def print_result(findings: dict[str, Finding]) -> int:
    """The table; 0 when everything was found and named."""
    command = f"python jobs/{' '.join([Path(__file__).name, *sys.argv[1:]])}"
    for line in describe_environment(command).lines():
        print(line)
    head = ("kind", "objects", "flips", "found", "named", "in blobs", "row named", "cuts", "found")
    print("\n" + "".join(f"{title:>10}" for title in head))
    total: Counter[str] = Counter()
    for kind, f in findings.items():
        values = (
            f.objects, f.flips, f.found, f.named, f.blob_flips, f.rows_named, f.cuts, f.cuts_found,
        )  # fmt: skip
        print(f"{kind:>10}" + "".join(f"{value:10}" for value in values))
        total.update(
            flips=f.flips,
            missed=f.flips - f.named + f.blob_flips - f.rows_named + f.cuts - f.cuts_found,
        )
        for missed in f.missed[:10]:
            print(f"    not named: {missed}")
    print(f"{total['flips']} bytes flipped; {total['missed']} cases not found or not named")
    return 1 if total["missed"] else 0


if __name__ == "__main__":
    main()
