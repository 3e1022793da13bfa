"""Archive v1: rows in Parquet on any store, committed unit by unit, verified to the byte.

    plan.json ─> part(s) ─> index ─> commit/<unit>.json ─> ... ─> manifest/000001.json
    plan/<plan_id>.json  ─> ...  ─> job/<plan_id>/<unit>.json ─> manifest/000002.json   and so on

Only commits and ``manifest/`` say what belongs to an archive; nothing trusts a listing of
``data/``. ``schemas/archive.v1.md`` is the contract.
"""

from dicmh_ray.archive.append import append_to_archive, published_units
from dicmh_ray.archive.commit import Commit, PartFacts, UnitStatistics
from dicmh_ray.archive.compact import CompactReport, compact_archive
from dicmh_ray.archive.gc import GcOptions, GcReport, collect_garbage
from dicmh_ray.archive.history import History, read_history
from dicmh_ray.archive.manifest import Manifest
from dicmh_ray.archive.part import PartOptions
from dicmh_ray.archive.plan import Plan, unit_identity
from dicmh_ray.archive.schema import ARROW_SCHEMA, BLOBS, SMALL_COLUMNS, EncodedImage, row_crc32c
from dicmh_ray.archive.snapshot import ArchiveStatistics, Snapshot, open_snapshot, reindex
from dicmh_ray.archive.store import Store, open_store, probe
from dicmh_ray.archive.verify import Problem, VerifyReport, verify_archive
from dicmh_ray.archive.writer import ArchiveWriter, create_archive, is_archive_table

__all__ = [
    "ARROW_SCHEMA",
    "BLOBS",
    "SMALL_COLUMNS",
    "ArchiveStatistics",
    "ArchiveWriter",
    "Commit",
    "CompactReport",
    "EncodedImage",
    "GcOptions",
    "GcReport",
    "History",
    "Manifest",
    "PartFacts",
    "PartOptions",
    "Plan",
    "Problem",
    "Snapshot",
    "Store",
    "UnitStatistics",
    "VerifyReport",
    "append_to_archive",
    "collect_garbage",
    "compact_archive",
    "create_archive",
    "is_archive_table",
    "open_snapshot",
    "open_store",
    "probe",
    "published_units",
    "read_history",
    "reindex",
    "row_crc32c",
    "unit_identity",
    "verify_archive",
]
