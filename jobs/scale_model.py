"""What an archive of a billion images is made of, what it costs, and what breaks first.

    python jobs/scale_model.py --images 1e9 --measure 1000 10000 --storm storm.json

Counts objects, bytes and requests of a job, its resumption, an append and a reader's opening, from the
sizes of real records: a commit of a unit of the asked size is written and measured, a plan and an
index likewise. ``--measure`` writes manifests of so many units, opens them, and takes the processor
time; that of the whole archive follows, since all of it is proportional to the units. ``--storm``
compares the requests that the model counts with those that ``jobs/commit_storm.py`` saw; exit code
1 where they differ. Prices are parameters; their defaults are round list prices of a large
provider's standard class.
"""

import argparse
import dataclasses
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dicmh_ray.archive import Plan
from dicmh_ray.archive.commit import (
    PARALLEL_REQUESTS,
    Commit,
    ObjectFacts,
    PartFacts,
    UnitStatistics,
    commit_name,
    created_by,
    new_attempt,
)
from dicmh_ray.archive.joined_index import MAX_JOINED_BYTES
from dicmh_ray.archive.manifest import Manifest, first_manifest
from dicmh_ray.archive.part import PartOptions, RowGroupFacts, write_index, write_parts
from dicmh_ray.archive.schema import SMALL_COLUMNS, EncodedImage
from dicmh_ray.bitstream import Header, State, parse_bitstream, write_bitstream
from dicmh_ray.source import Unit

CODEC_ID = "ab" * 32
SAMPLE_ROWS = 2000
LIST_PAGE = 1000
"""Names in one answer of an S3 listing."""

PUTS_PER_PREFIX_S = 3500
"""Writes a second that S3 takes below one prefix, as its vendor documents."""

SINGLE_PUT_BYTES = 5 * 2**30
TOLERANCE = 0.02
"""Requests a shard that were asked twice, because a connection broke."""

GB, MB = 1e9, 1e6


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What the model is asked about."""

    images: int
    images_per_unit: int
    image_bytes: int
    """Mean bytes of a source image."""

    stream_bytes: int
    """Mean bytes of a bitstream."""

    workers: int
    images_per_worker_s: float
    request_s: float
    """Mean seconds of a small request."""

    put_price: float
    """Of 1,000 puts or listings."""

    get_price: float
    """Of 1,000 gets."""

    storage_price: float
    """Of a GB and month."""


@dataclass(frozen=True, kw_only=True)
class RecordSizes:
    """Bytes of real records."""

    commit: int
    """Of one unit."""

    plan_unit: int
    """One unit in the plan."""

    index_row: float
    """One row in a unit's index."""

    key_in_memory: float
    """One row's key, decoded."""

    part_row: float
    """One row in a part, its bitstream included."""

    parts_per_unit: int


@dataclass(frozen=True, kw_only=True)
class Opening:
    """A manifest that was written and opened."""

    units: int
    manifest_bytes: int
    write_s: float
    """Of processor time, on one core."""

    open_s: float
    memory_bytes: int
    """Growth of the process's peak while it was opened, its bytes included."""


def sample_row(number: int, stream_bytes: int) -> EncodedImage:
    """A row as the shipped codec writes it, with bytes of the length that is asked for."""
    states = 3
    payload = number.to_bytes(8, "little") * math.ceil(stream_bytes / states / 8)
    header = Header(codec_id=CODEC_ID, width=640, height=480, num_states=states)
    payloads = [State(payload[: stream_bytes // states], k) for k in range(states)]
    stream = write_bitstream(header, (), payloads)
    prefixes = parse_bitstream(stream).prefix_bytes
    return EncodedImage(
        key=f"{number:09d}",
        status="ok",
        width=640,
        height=480,
        bpp=8 * len(stream) / (640 * 480),
        tier="faithful",
        psnr=31.0 + number % 100 / 25,
        worst_tile_psnr=25.0 + number % 90 / 30,
        ms_ssim=0.95 + number % 80 / 2000,
        num_states=states,
        source_uri=f"s3://collection/shards/{number // 10_000:06d}.tar",
        source_offset=512 * (number % 10_000) * 200,
        original_sha256=f"{number * 0x9E3779B97F4A7C15 % 2**256:064x}",
        original_bytes=100_000 + number % 5000,
        original_format="JPEG",
        metadata=json.dumps({"caption": f"a picture of thing {number % 1000}"}),
        prefix_bytes=prefixes,
        base=stream[: prefixes[1]],
        detail=stream[prefixes[1] :],
    )


def make_commit(unit: str, facts: PartFacts, index: ObjectFacts) -> Commit:
    """A commit of one unit."""
    return Commit(
        unit=unit,
        plan_id="cd" * 32,
        codec_id=CODEC_ID,
        attempt=new_attempt(),
        parts=(facts,),
        index=index,
        statistics=UnitStatistics(rows=facts.num_rows, ok=facts.num_rows, bytes_in=10**9),
        info={"worker": "node-0123.example:123456", "causes": {}, "psnr_sum": 312345.678},
        created_by=created_by(),
    )


def measure_records(assumed: Assumptions) -> tuple[RecordSizes, Commit]:
    """Write a part, and a commit of a whole unit; their sizes, and the commit."""
    rows = [sample_row(number, assumed.stream_bytes) for number in range(SAMPLE_ROWS)]
    (part,) = write_parts("000000", rows, footer={}, options=PartOptions())
    index = write_index(part.index)
    group_rows = part.row_groups[0].num_rows
    unit_bytes = len(part.data) / SAMPLE_ROWS * assumed.images_per_unit
    parts = max(1, math.ceil(unit_bytes / PartOptions().part_bytes))
    groups = max(1, math.ceil(assumed.images_per_unit / group_rows / parts))
    # A checksum is any 32-bit number: the sample's own are as long as others.
    facts = dataclasses.replace(
        PartFacts.of(part),
        num_bytes=int(unit_bytes / parts),
        row_groups=tuple(
            RowGroupFacts(num_rows=group_rows, chunk_crc32c=(2_345_678_901,) * len(SMALL_COLUMNS))
            for _ in range(groups)
        ),
    )
    commit = make_commit(
        "000000", facts, ObjectFacts.of("index/000000-0123456789abcdef.parquet", index)
    )
    commit = dataclasses.replace(commit, parts=(facts,) * parts)
    unit = Unit(
        name="000000",
        kind="tar",
        uri="s3://collection/shards/000000.tar",
        start=None,
        stop=None,
        etag="0123456789abcdef0123456789abcdef",
        num_bytes=assumed.image_bytes * assumed.images_per_unit,
    )
    plan = Plan(units=[unit.to_dict()], codec_id=CODEC_ID, parameters={})
    empty = Plan(units=[], codec_id=CODEC_ID, parameters={})
    sizes = RecordSizes(
        commit=len(commit.to_bytes()),
        plan_unit=len(plan.to_bytes()) - len(empty.to_bytes()),
        index_row=len(index) / SAMPLE_ROWS,
        key_in_memory=part.index["key"].nbytes / SAMPLE_ROWS,
        part_row=len(part.data) / SAMPLE_ROWS,
        parts_per_unit=parts,
    )
    return sizes, commit


def open_manifest(template: Commit, units: int) -> Opening:
    """Write a manifest of so many units, and open it as a reader does."""
    names = [f"{number:06d}" for number in range(units)]
    plan = Plan(
        units=[{"name": name, "uri": f"s3://collection/shards/{name}.tar"} for name in names],
        codec_id=CODEC_ID,
        parameters={},
    )
    commits = {
        commit_name(name): dataclasses.replace(template, unit=name, plan_id=plan.plan_id)
        for name in names
    }
    manifest = first_manifest(plan, commits, "ef" * 32)
    started = time.process_time()
    data = manifest.to_bytes()
    written = time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = Manifest.from_bytes(manifest.name, data, plan)
    opened = time.process_time()
    assert len(found.commits) == units
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return Opening(
        units=units,
        manifest_bytes=len(data),
        write_s=written - started,
        open_s=opened - written,
        memory_bytes=grown + len(data),
    )


def model(
    assumed: Assumptions, sizes: RecordSizes, openings: Sequence[Opening]
) -> dict[str, float]:
    """Counts, bytes, seconds and prices of the whole archive."""
    units = math.ceil(assumed.images / assumed.images_per_unit)
    parts = units * sizes.parts_per_unit
    rate = assumed.workers * assumed.images_per_worker_s
    manifest_bytes = units * (sizes.commit + 110)  # with its name and digest
    pages = math.ceil(units / LIST_PAGE)
    asked = requests_per_unit(sizes.parts_per_unit)
    puts = units * (asked["puts"] + asked["conditional puts"])
    lists, reads = parts, units * (asked["gets"] + asked["heads"]) - parts
    joined_bytes = sizes.index_row * assumed.images
    joins = units if joined_bytes <= MAX_JOINED_BYTES else 0
    archive_bytes = sizes.part_row * assumed.images
    source_bytes = float(assumed.images) * assumed.image_bytes
    found = {
        "units": units,
        "parts": parts,
        "objects": parts + 2 * units,
        "bytes of a part": archive_bytes / parts,
        "bytes of a commit": sizes.commit,
        "source, TB": source_bytes / 1e12,
        "archive, TB": archive_bytes / 1e12,
        "row indexes, GB": joined_bytes / GB,
        "a reader by key holds, GB": (sizes.index_row + sizes.key_in_memory) * assumed.images / GB,
        "plan, MB": sizes.plan_unit * units / MB,
        "manifest, MB": manifest_bytes / MB,
        "days of the job": assumed.images / rate / 86400,
        "commits a second": rate / assumed.images_per_unit,
        "share of one prefix's write rate": 3 * rate / assumed.images_per_unit / PUTS_PER_PREFIX_S,
        "puts of the job": puts,
        "gets, heads and listings of the job": reads + lists,
        "price of the job's requests": (
            (puts + lists) * assumed.put_price + reads * assumed.get_price
        )
        / 1e3,
        "listings to resume": pages,
        "seconds to resume": pages * assumed.request_s,
        "gets to finalize": units + joins,
        "seconds of these gets": (units + joins) * assumed.request_s / PARALLEL_REQUESTS,
        "price to finalize": (pages * assumed.put_price + (units + joins) * assumed.get_price)
        / 1e3,
        "price of a month, sources": source_bytes / GB * assumed.storage_price,
        "price of a month, archive": archive_bytes / GB * assumed.storage_price,
        "limit: images with a joined index": MAX_JOINED_BYTES / sizes.index_row,
        "limit: images until a manifest fills one put": (
            assumed.images * SINGLE_PUT_BYTES / manifest_bytes
        ),
    }
    if openings:
        last = openings[-1]
        found["seconds to write the manifest"] = last.write_s / last.units * units
        found["seconds to open the manifest"] = last.open_s / last.units * units
        found["memory to open it, GB"] = last.memory_bytes / last.units * units / GB
    return found


def requests_per_unit(parts: int) -> dict[str, float]:
    """What the commit of one unit asks of the store; see ``ArchiveWriter.commit_unit``."""
    return {
        "conditional puts": 1,  # the commit
        "gets": 1 + parts,  # is it committed; for each part a listing, as there is none yet
        "heads": parts,  # is there a part of that name, and how old
        "puts": parts + 1,  # and the unit's index
    }


def differences(storm: Path) -> list[str]:
    """Where the measured requests of a shard are not the model's."""
    wanted = requests_per_unit(1)
    return [
        f"{each['shards']} shards: {kind}: {each['requests'].get(kind, 0.0):.3f}, not {count}"
        for each in json.loads(storm.read_text())
        for kind, count in wanted.items()
        if abs(each["requests"].get(kind, 0.0) - count) > TOLERANCE
    ]


def main() -> int:
    """Print the model."""
    parser = argparse.ArgumentParser(description="An archive of very many images, on paper.")
    parser.add_argument("--images", type=float, default=1e9)
    parser.add_argument("--images-per-unit", type=int, default=10_000)
    parser.add_argument("--image-bytes", type=int, default=110_000, help="mean, of the sources")
    parser.add_argument("--stream-bytes", type=int, default=12_000, help="mean, of the streams")
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--images-per-worker-s", type=float, default=20.0)
    parser.add_argument("--request-s", type=float, default=0.03, help="mean of a small request")
    parser.add_argument("--put-price", type=float, default=0.005, help="of 1,000 puts or listings")
    parser.add_argument("--get-price", type=float, default=0.0004, help="of 1,000 gets")
    parser.add_argument("--storage-price", type=float, default=0.023, help="of a GB and month")
    parser.add_argument("--measure", type=int, nargs="*", default=[1000], help="units to open")
    parser.add_argument("--storm", type=Path, help="what jobs/commit_storm.py wrote")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(Assumptions)}
    assumed = Assumptions(**{**values, "images": int(options.images)})
    sizes, commit = measure_records(assumed)
    openings = [open_manifest(commit, units) for units in sorted(options.measure)]
    found = model(assumed, sizes, openings)
    print(f"{assumed.images:,} images, {assumed.images_per_unit:,} a unit; prices are parameters")
    for name, value in found.items():
        print(f"  {name:48} {value:>16,.{0 if value >= 1000 else 3}f}")
    for each in openings:
        print(
            f"  a manifest of {each.units:,} units: {each.manifest_bytes / MB:.1f} MB, "
            f"written in {each.write_s:.2f} s, opened in {each.open_s:.2f} s, "
            f"{each.memory_bytes / MB:.0f} MB of memory"
        )
    if options.json is not None:
        report = {
            "assumed": asdict(assumed),
            "sizes": asdict(sizes),
            "found": found,
            "openings": [asdict(each) for each in openings],
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    differing = differences(options.storm) if options.storm is not None else []
    for difference in differing:
        print(f"  the model is wrong: {difference}")
    if options.storm is not None and not differing:
        print("  requests of a unit as the storm saw them")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
