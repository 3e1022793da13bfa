"""Files of the official Diff-ICMH program -> an archive: a job whose rows need no picture.

    plan_import ── create_archive(plan) ── units of files not committed yet
                                                │
    ImportJob.rows: read ─ parse ─ size ─ codec.import_official ─ EncodedImage

An :class:`ImportJob` is run by what runs any :class:`~dicmh_ray.pipeline.Job`, with its commits,
retries, failure budget and report. The pictures that the files were made of are unknown: no quality
is measured, the tier is ``none``, and what stands for the original is the official file.
"""

import csv
import hashlib
import io
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from dicmh_ray.archive import EncodedImage, Plan
from dicmh_ray.archive.schema import Status
from dicmh_ray.archive.sealed import digest
from dicmh_ray.bitstream import MAX_AREA_PX, MAX_SIDE_PX, parse_bitstream, prefix_bytes
from dicmh_ray.codec import ImageCodec, ImageTagger, read_checkpoint
from dicmh_ray.codec.checkpoint import DIFF_ICMH
from dicmh_ray.codec.checkpoint import Checkpoint as CheckpointFiles
from dicmh_ray.codec.icmh.official import OfficialStream, OfficialTranscoder, parse_official
from dicmh_ray.codec.vocabularies import VOCABULARY_FILE, parse_vocabulary
from dicmh_ray.errors import (
    BitstreamError,
    CodecMismatchError,
    MissingExtraError,
    SourceFormatError,
    SourceNotFoundError,
    TagsError,
    WeightsError,
)
from dicmh_ray.pipeline.checkpoint import Checkpoint
from dicmh_ray.pipeline.encode import (
    ENCODE_FAILED,
    MAX_REASON_CHARS,
    TAG_FAILED,
    UNDECODABLE,
    WRONG_SIZE,
    EncodeOptions,
    EncodePolicy,
)
from dicmh_ray.pipeline.job import Job, open_job
from dicmh_ray.pipeline.loading import CRASH, UNREADABLE
from dicmh_ray.pipeline.report import JobReport
from dicmh_ray.source import SourceImage, SourceOptions, Unit, plan_units, read_unit
from dicmh_ray.source.expand import kind_of
from dicmh_ray.source.files import stem_of
from dicmh_ray.source.image import UniqueKeys
from dicmh_ray.source.store import open_filesystem
from dicmh_ray.tags import Vocabulary

_log = logging.getLogger(__name__)

FORMAT_NAME = "diff-icmh"
"""In the column ``original_format``."""

FILES_PER_UNIT = 64
"""A file at full width takes seconds, so units are smaller than those of pictures."""

PASSED_OVER = frozenset({"cls", "csv", "json", "log", "md", "sh", "txt", "yaml", "yml", "zip"})
"""Extensions of files in a folder that are no official ones, besides pictures, tars and Parquet
files. Official files have none, but the picture's name may have had a dot."""

SIZE_COLUMNS = ("file", "width", "height")


class Size(NamedTuple):
    """Of a picture without padding, in pixels."""

    width: int
    height: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportOptions:
    """What decides the rows of an import, besides the files and the codec."""

    sizes: Mapping[str, Size] | None = field(default=None, repr=False)
    """Key of a file -> its picture's size, see :func:`read_sizes`. None: the padded size is taken
    for the picture's, so that its right and lower edges show the padding."""

    keep_original: bool = False
    """Keep the bytes of official files beside the streams."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for a plan: sizes by their digest."""
        sizes = None if self.sizes is None else digest({k: [*v] for k, v in self.sizes.items()})
        return {"sizes_sha256": sizes, "keep_original": self.keep_original}

    def size_of(self, key: str, stream: OfficialStream) -> Size | None:
        """The size of a stream's picture; None where none was given.

        Raises:
            InvalidHeaderError: it pads to another size than the stream's.
        """
        if self.sizes is None:
            return Size(*stream.padded_size)
        found = self.sizes.get(key) or self.sizes.get(key.rpartition("/")[2])
        if found is not None:
            stream.check_size(*found)
        return found


class FoundFile(NamedTuple):
    """What a look at a file says without a codec."""

    key: str
    stream: OfficialStream | None
    size: Size | None
    error: str | None

    @classmethod
    def of(cls, image: SourceImage, options: ImportOptions) -> Self:
        """Parse a file and find its size; what is wrong is in ``error``."""
        stream = None
        try:
            if image.error is not None:
                return cls(image.key, None, None, f"{UNREADABLE}: {image.error.reason}")
            stream = parse_official(image.data)
            size = options.size_of(image.key, stream)
            width, height = stream.padded_size
            error = f"{WRONG_SIZE}: none is given; padded it is {width}x{height}"
            return cls(image.key, stream, size, None if size else error)
        except BitstreamError as exc:
            cause = UNREADABLE if stream is None else WRONG_SIZE
            return cls(image.key, stream, None, f"{cause}: {exc}")


@dataclass(frozen=True, kw_only=True)
class ImportJob(Job):
    """A job whose sources are official files. Pickles."""

    options: ImportOptions
    vocabulary: Vocabulary | None

    def rows(
        self,
        unit: Unit,
        codec: ImageCodec,
        *,
        tagger: ImageTagger | None = None,
        quarantine: Collection[int] = (),
    ) -> Iterator[EncodedImage]:
        """The unit's rows. Whatever is wrong with a file is in its row. Tags are those of the files.

        Raises:
            WeightsError, CodecMismatchError, MissingExtraError: no other file will fare better.
        """
        if not isinstance(codec, OfficialTranscoder):
            raise WeightsError(self.checkpoint.codec_id[:16], "it reads no official streams")
        keys = UniqueKeys()
        for position, image in enumerate(self.read(unit)):
            key = keys.claim(image.key)
            if position in quarantine:
                error = f"{CRASH}: a worker process died on this file"
                yield self._row(key, image, FoundFile(key, None, None, error), b"")
                continue
            found = FoundFile.of(image, self.options)
            data = b""
            if found.stream is not None and found.size is not None:
                try:
                    width, height = found.size
                    data = codec.import_official(found.stream, width=width, height=height)
                except (CodecMismatchError, MissingExtraError, WeightsError):
                    raise
                except Exception as exc:  # noqa: BLE001  whatever it is, this file has it
                    _log.warning("importing %r failed: %r", key, exc)
                    found = found._replace(error=_reason(exc))
            yield self._row(key, image, found, data)

    def _row(self, key: str, image: SourceImage, found: FoundFile, data: bytes) -> EncodedImage:
        stream, size = found.stream, found.size
        original = image.data if self.options.keep_original else b""
        without: Status = "kept_original" if original else "failed"
        facts: dict[str, Any] = {}
        if stream is not None:
            facts = {
                "y_bytes": len(stream.y_string),
                "z_bytes": len(stream.z_string),
                "num_tags": None if stream.tag_ids is None else len(stream.tag_ids),
                "is_padded_size": self.options.sizes is None,
            }
        metadata = {**image.metadata, "official": facts}
        tags = parse_bitstream(data, vocabulary=self.vocabulary).tags if data else ()
        return EncodedImage(
            key=key,
            status="ok" if data else without,
            error=found.error,
            tags=tags,
            width=size.width if size else None,
            height=size.height if size else None,
            bpp=8 * len(data) / (size.width * size.height) if data and size else None,
            tier="none",
            num_states=1 if data else None,
            source_uri=image.source_uri,
            source_offset=image.source_offset,
            original_sha256=hashlib.sha256(image.data).hexdigest() if image.data else "",
            original_bytes=len(image.data),
            original_format=FORMAT_NAME if stream is not None else None,
            metadata=json.dumps(metadata, ensure_ascii=False, separators=(",", ":")),
            prefix_bytes=prefix_bytes(data) if data else (),
            base=data,
            original=original,
        )


def plan_import(
    sources: Sequence[str],
    archive: str,
    *,
    checkpoint: str | Path,
    options: ImportOptions,
    encode_options: EncodeOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> tuple[ImportJob, list[Unit], JobReport]:
    """Plan the units, create or reopen the archive, and find what is left to do.

    Args:
        sources: official files, folders of them, on any fsspec store.
        archive: its address.
        checkpoint: directory of the weights that the files were written with, converted.
        options: sizes, and what is kept; part of the plan.
        encode_options: device and threads. Whether a file decodes may depend on them.
        storage_options: for the archive's store. Never written anywhere.

    Raises:
        SourceNotFoundError: a source names nothing.
        SourceFormatError: a source is of another kind.
        PlanConflictError: the archive was begun with other sources, codec or options.
        WeightsError: the checkpoint is missing or incomplete, or not Diff-ICMH's.
        VocabularyError: its vocabulary is damaged.
    """
    content = _read_icmh_checkpoint(checkpoint)
    source_options = SourceOptions(files_per_unit=FILES_PER_UNIT)
    units = plan_files(sources, source_options)
    plan = Plan(
        units=[unit.to_dict() for unit in units],
        codec_id=content.codec_id,
        parameters={"official": options.to_dict(), "source": source_options.to_dict()},
    )
    codec = Checkpoint(codec_id=content.codec_id, files=content.files)
    writer, todo, report = open_job(
        archive, plan, codec, units, resume=True, storage_options=storage_options
    )
    job = ImportJob(
        writer=writer,
        checkpoint=codec,
        policy=EncodePolicy(keep_original="always" if options.keep_original else "never"),
        source_options=source_options,
        encode_options=encode_options or EncodeOptions(),
        options=options,
        vocabulary=_vocabulary(content),
    )
    return job, todo, report


def look_through(
    sources: Sequence[str], *, checkpoint: str | Path, options: ImportOptions
) -> Iterator[FoundFile]:
    """What :func:`plan_import` and its job would find, as far as that needs no network.

    Raises as :func:`plan_import`.
    """
    vocabulary = _vocabulary(_read_icmh_checkpoint(checkpoint))
    num_words = 0 if vocabulary is None else len(vocabulary.words)
    source_options = SourceOptions(files_per_unit=FILES_PER_UNIT)
    for unit in plan_files(sources, source_options):
        for image in read_unit(unit, options=source_options):
            found = FoundFile.of(image, options)
            last = max(found.stream.tag_ids or (), default=-1) if found.stream else -1
            if found.error is None and last >= num_words:
                error = f"{TAG_FAILED}: word number {last}, the checkpoint has {num_words} words"
                found = found._replace(error=error)
            yield found


def plan_files(sources: Sequence[str], options: SourceOptions) -> list[Unit]:
    """Units of official files. A key is a path below the folder that all of them share.

    A folder gives all its files, recursively, but hidden ones and those whose extension says that
    they are something else (:data:`PASSED_OVER`, pictures, tars, Parquet files).

    Raises:
        SourceNotFoundError: a source names nothing.
        SourceFormatError: a source is a tar or Parquet file.
    """
    names: dict[str, None] = {}
    for source in sources:
        names.update(dict.fromkeys(_files_of(source, options)))
    units = plan_units(list(names), options=options)
    for unit in units:
        if unit.kind != "files":
            raise SourceFormatError(str(unit.uri), f"a {unit.kind} file holds no official files")
    return units


def read_sizes(path: Path) -> dict[str, Size]:
    """Sizes of pictures from a CSV file with the columns ``file``, ``width`` and ``height``.

    ``file`` is a file's key or its last part; it may have an extension that the official file lacks,
    as the picture's name has; where that leaves two sizes for one name, the name has none.

    Raises:
        SourceFormatError: a column is missing, a size is none, or a file has two sizes.
        OSError: the file cannot be read.
    """
    try:
        lines = csv.DictReader(io.StringIO(path.read_text("utf-8-sig"), newline=""))
        rows = [(lines.line_num, row) for row in lines]
    except (UnicodeDecodeError, csv.Error) as exc:
        raise SourceFormatError(str(path), f"no CSV: {exc}") from exc
    if missing := [name for name in SIZE_COLUMNS if name not in (lines.fieldnames or ())]:
        raise SourceFormatError(str(path), f"no column {missing[0]!r}")
    exact: dict[str, Size] = {}
    stems: dict[str, set[Size]] = {}
    for line, row in rows:
        name = row["file"]
        try:
            size = Size(int(row["width"]), int(row["height"]))
        except (TypeError, ValueError) as exc:
            raise SourceFormatError(str(path), f"line {line}: no size: {exc}") from exc
        if min(size) < 1 or max(size) > MAX_SIDE_PX or size.width * size.height > MAX_AREA_PX:
            raise SourceFormatError(
                str(path), f"line {line}: no picture is {size.width}x{size.height}"
            )
        if not name or exact.setdefault(name, size) != size:
            raise SourceFormatError(str(path), f"line {line}: {name!r} has another size already")
        stems.setdefault(stem_of(name), set()).add(size)
    return {stem: found.pop() for stem, found in stems.items() if len(found) == 1} | exact


def _read_icmh_checkpoint(checkpoint: str | Path) -> CheckpointFiles:
    content = read_checkpoint(checkpoint)
    if content.codec != DIFF_ICMH:
        raise WeightsError(content.name, f"official streams need a checkpoint of {DIFF_ICMH}")
    return content


def _vocabulary(content: CheckpointFiles) -> Vocabulary | None:
    if VOCABULARY_FILE not in content.files:
        return None
    return parse_vocabulary(content.files[VOCABULARY_FILE])


def _files_of(source: str, options: SourceOptions) -> list[str]:
    """The official files that a source names: itself, or those of a folder."""
    fs, path = open_filesystem(source, options)
    if not fs.isdir(path):
        return [source]
    root = path.rstrip("/") + "/"
    found = (
        [f"{folder}/{name}" for folder, _, names in os.walk(path) for name in names]
        if "file" in fs.protocol
        else fs.find(path)
    )
    kept = [
        str(fs.unstrip_protocol(file))
        for file in sorted(found)
        if not any(part.startswith(".") for part in file.removeprefix(root).split("/"))
        and kind_of(file) is None
        and Path(file).suffix.lower().removeprefix(".") not in PASSED_OVER
    ]
    if not kept:
        raise SourceNotFoundError(source)
    return kept


def _reason(exc: Exception) -> str:
    """Why a file that was parsed has no stream, for its row."""
    if isinstance(exc, TagsError):
        return f"{TAG_FAILED}: {exc}"[:MAX_REASON_CHARS]
    if isinstance(exc, BitstreamError):
        return f"{UNDECODABLE}: {exc}"[:MAX_REASON_CHARS]
    return f"{ENCODE_FAILED}: {type(exc).__name__}: {exc}"[:MAX_REASON_CHARS]
