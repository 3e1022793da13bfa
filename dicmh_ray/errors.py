"""Every error this package raises, by what the caller should do about it.

* DicmhError
  x SourceError             this collection cannot be read: fix the arguments or the source
    + SourceNotFoundError
    + SourceAddressError    no filesystem can be had for this address
    + SourceFormatError
    + SourceColumnsError    a table's columns have no clear roles: name them in the options
    + SourceChangedError    the source is not the one that was planned: plan again
  x SourceImageError        this image cannot be coded: record it, go on
    + UnreadableImageError
    + UnsupportedImageError
  x BitstreamError          these bytes are bad: quarantine the row, go on
    + NotABitstreamError
    + UnsupportedVersionError
    + TruncatedBitstreamError
    + InvalidHeaderError
    + ChecksumError
    + SymbolError
  x CodecError              the codec is wrong, not the data: stop the job
    + CodecMismatchError
    + EncodeError
    + WeightsError
    + DeviceError           torch cannot compute on that device: name another
    + ViewError             the checkpoint draws no such view: ask for another
  x TagsError               tags cannot be made or read as asked
    + VocabularyError       a word list is not one: the message names the line
    + TaggerError           a tagger cannot be loaded, or does not keep its contract
  x ArchiveError
    + ArchiveNotFoundError
    + VersionExpiredError   that version was given up: open a newer one
    + AppendError           a job cannot be added to this archive: the message says why
    + PlanConflictError     another job owns this archive: choose another name or its settings
    + SchemaVersionError
    + CorruptObjectError    a stored object is damaged: verify, repair that unit
    + CorruptRowError       one row is damaged: the others are readable
    + RowNotFoundError
    + WhereError            the filter text is wrong
    + ResultsError          an analysis left no such results here: run it
    + ReadStateError        a bookmark is not one of this order of rows
    + CommitFailedError     nothing was published: safe to retry
    + CommitUnknownError    may have been published: read the commit, then decide
    + StoreAddressError     nothing here can open such an address: the message says why
    + StoreUnavailableError the store answered none of many tries: run again later
    + StoreAccessError      the store refuses: fix the credentials or the rights
  x ManifestError           a Kubernetes manifest cannot be made of these values
  x NetError                a net that looks at pictures is not usable as described
  x TaskError               a task of an analysis cannot be loaded, or does not keep its contract
  x JobError
    + FailureBudgetError    too many images failed: look at the report, then resume
    + RayUnavailableError   Ray did not start or answer: try again, name another, or do without
    + JobStoppedError       it was told to stop (SIGTERM, preemption): run it again to go on
  x MissingExtraError       an optional dependency is not installed: the message says how

Every class keeps its constructor arguments in ``args``, positionally: that is what pickle replays,
so that an error raised in a worker process arrives in the driver with its type and its fields.
"""


class DicmhError(Exception):
    """Base of every error of this package."""


class SourceError(DicmhError):
    """A collection of images cannot be read."""


class SourceNotFoundError(SourceError):
    """No object matches a source argument."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.source = source

    def __str__(self) -> str:
        return f"no file matches {self.source!r}"


class SourceAddressError(SourceError, ValueError):
    """A source argument is an address that cannot be opened, whatever lies there."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class SourceFormatError(SourceError):
    """A source object is not in the format its name or its first bytes promise."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class SourceColumnsError(SourceError):
    """A sound table does not say which column holds what, or lacks one that the options name."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}"


class SourceChangedError(SourceError):
    """A source object is not the one that was planned."""

    def __init__(self, source: str, when: str) -> None:
        super().__init__(source, when)
        self.source, self.when = source, when

    def __str__(self) -> str:
        return f"{self.source} was changed {self.when}"


class SourceImageError(DicmhError):
    """One image cannot be coded. ``reason`` is a short stable phrase fit for statistics."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class UnreadableImageError(SourceImageError):
    """The bytes are no image, or a damaged one."""


class UnsupportedImageError(SourceImageError):
    """A sound image of a kind the codec does not serve (alpha, 16-bit, CMYK, animated, ...)."""


class BitstreamError(DicmhError):
    """These bytes cannot be decoded."""


class NotABitstreamError(BitstreamError):
    """The magic number is missing."""

    def __init__(self, found: bytes) -> None:
        super().__init__(found)
        self.found = found

    def __str__(self) -> str:
        return f"not a dicmh bitstream: starts with {self.found!r}"


class UnsupportedVersionError(BitstreamError):
    """A bitstream of a version this package does not read."""

    def __init__(self, found: int, supported: int) -> None:
        super().__init__(found, supported)
        self.found, self.supported = found, supported

    def __str__(self) -> str:
        return f"bitstream version is {self.found}, this package reads {self.supported}"


class TruncatedBitstreamError(BitstreamError):
    """The bytes end before a section does."""

    def __init__(self, section: str, needed_bytes: int, found_bytes: int) -> None:
        super().__init__(section, needed_bytes, found_bytes)
        self.section, self.needed_bytes, self.found_bytes = section, needed_bytes, found_bytes

    def __str__(self) -> str:
        return f"section {self.section!r} needs {self.needed_bytes} bytes, {self.found_bytes} left"


class InvalidHeaderError(BitstreamError):
    """A header field is outside its documented range."""

    def __init__(self, field: str, found: object, wanted: str) -> None:
        super().__init__(field, found, wanted)
        self.field, self.found, self.wanted = field, found, wanted

    def __str__(self) -> str:
        return f"header field {self.field!r} is {self.found!r}, wanted {self.wanted}"


class ChecksumError(BitstreamError):
    """A section's CRC-32C does not match its bytes."""

    def __init__(self, section: str, expected: int, actual: int) -> None:
        super().__init__(section, expected, actual)
        self.section, self.expected, self.actual = section, expected, actual

    def __str__(self) -> str:
        return (
            f"section {self.section!r}: CRC-32C is {self.actual:#010x}, "
            f"the stream says {self.expected:#010x}"
        )


class SymbolError(BitstreamError):
    """The bytes are intact but do not decode to the symbols that were encoded.

    Either the stream was made to deceive, or this decoder's tables are not the encoder's.
    """

    def __init__(self, section: str, reason: str) -> None:
        super().__init__(section, reason)
        self.section, self.reason = section, reason

    def __str__(self) -> str:
        return f"section {self.section!r}: {self.reason}"


class CodecError(DicmhError):
    """The codec is wrong, not the data."""


class CodecMismatchError(CodecError):
    """A bitstream or archive was written by another checkpoint."""

    def __init__(self, expected: str, found: str) -> None:
        super().__init__(expected, found)
        self.expected, self.found = expected, found

    def __str__(self) -> str:
        return f"this codec is {self.expected}, the data was written by {self.found}"


class EncodeError(CodecError):
    """An image cannot be encoded: its latent is not finite, or the written bytes do not verify."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class WeightsError(CodecError):
    """A checkpoint is missing, incomplete, or not what its digest says."""

    def __init__(self, checkpoint: str, reason: str) -> None:
        super().__init__(checkpoint, reason)
        self.checkpoint, self.reason = checkpoint, reason

    def __str__(self) -> str:
        return f"checkpoint {self.checkpoint}: {self.reason}"


class DeviceError(CodecError):
    """Torch cannot compute on the device that was asked for."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(device, reason)
        self.device, self.reason = device, reason

    def __str__(self) -> str:
        return f"device {self.device!r}: {self.reason}"


class ViewError(CodecError):
    """A checkpoint does not draw the view that was asked for."""

    def __init__(self, view: str, offered: str) -> None:
        super().__init__(view, offered)
        self.view, self.offered = view, offered

    def __str__(self) -> str:
        return f"view is {self.view!r}, this checkpoint offers {self.offered}"


class TagsError(DicmhError):
    """Tags cannot be made or read as asked."""


class VocabularyError(TagsError):
    """A file is not a list of words. ``line`` counts from 1; 0 is the file as a whole."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(file, line, reason)
        self.file, self.line, self.reason = file, line, reason

    def __str__(self) -> str:
        where = f", line {self.line}" if self.line else ""
        return f"vocabulary {self.file}{where}: {self.reason}"


class TaggerError(TagsError):
    """What should say what pictures show cannot be loaded, or does not keep its contract."""

    def __init__(self, tagger: str, reason: str) -> None:
        super().__init__(tagger, reason)
        self.tagger, self.reason = tagger, reason

    def __str__(self) -> str:
        return f"tagger {self.tagger}: {self.reason}"


class ArchiveError(DicmhError):
    """An archive cannot be written or read as asked."""


class ArchiveNotFoundError(ArchiveError):
    """There is no archive at this address."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.uri = uri

    def __str__(self) -> str:
        return f"no archive at {self.uri}"


class VersionExpiredError(ArchiveError):
    """A version of an archive was given up, and its objects deleted."""

    def __init__(self, uri: str, version: int) -> None:
        super().__init__(uri, version)
        self.uri, self.version = uri, version

    def __str__(self) -> str:
        return f"version {self.version} of {self.uri} was given up by gc: open a newer one"


class AppendError(ArchiveError):
    """A job cannot be added to an archive."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        return f"nothing can be appended to {self.uri}: {self.reason}"


class PlanConflictError(ArchiveError):
    """The archive was started with other sources, codec or settings."""

    def __init__(self, uri: str, expected: str, found: str) -> None:
        super().__init__(uri, expected, found)
        self.uri, self.expected, self.found = uri, expected, found

    def __str__(self) -> str:
        return (
            f"{self.uri} belongs to plan {self.found[:16]}, this job's plan is "
            f"{self.expected[:16]}: other sources, codec or settings"
        )


class SchemaVersionError(ArchiveError):
    """An archive object is of a version this package does not read."""

    def __init__(self, name: str, found: object, supported: object) -> None:
        super().__init__(name, found, supported)
        self.name, self.found, self.supported = name, found, supported

    def __str__(self) -> str:
        return f"{self.name} has version {self.found!r}, this package reads {self.supported!r}"


class CorruptObjectError(ArchiveError):
    """A stored object is missing, or its bytes are not those that were committed."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class CorruptRowError(ArchiveError):
    """One row of a part does not match its checksum."""

    def __init__(self, part: str, row_group: int, row: int, key: str, reason: str) -> None:
        super().__init__(part, row_group, row, key, reason)
        self.part, self.row_group, self.row, self.key = part, row_group, row, key
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"{self.part} row group {self.row_group} row {self.row} ({self.key!r}): {self.reason}"
        )


class RowNotFoundError(ArchiveError, KeyError):
    """No row has this key."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"no row with key {self.key!r}"


class WhereError(ArchiveError):
    """A filter expression cannot be understood."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text, reason)
        self.text, self.reason = text, reason

    def __str__(self) -> str:
        return f"filter {self.text!r}: {self.reason}"


class ResultsError(ArchiveError):
    """An archive has no such results of an analysis, or not all of them."""

    def __init__(self, uri: str, name: str, reason: str) -> None:
        super().__init__(uri, name, reason)
        self.uri, self.name, self.reason = uri, name, reason

    def __str__(self) -> str:
        return f"{self.uri}: results {self.name}: {self.reason}"


class ReadStateError(ArchiveError):
    """What a walk through an archive shall go on from is no place in it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot go on from this state: {self.reason}"


class CommitFailedError(ArchiveError):
    """Nothing was published: safe to retry."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} was not published: {self.reason}"


class CommitUnknownError(ArchiveError):
    """The store gave no answer that tells: read the object, then decide."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} may have been published: {self.reason}"


class StoreAddressError(ArchiveError, ValueError):
    """An address is of no kind of store that this installation can open."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(uri, reason)
        self.uri, self.reason = uri, reason

    def __str__(self) -> str:
        return f"{self.uri} cannot be opened: {self.reason}"


class StoreUnavailableError(ArchiveError, ConnectionError):
    """A request was tried again and again, and the store never answered it."""

    def __init__(self, uri: str, name: str, tries: int, reason: str) -> None:
        super().__init__()
        # OSError would keep two of them, as an error number and its text.
        self.args = (uri, name, tries, reason)
        self.uri, self.name, self.tries, self.reason = uri, name, tries, reason

    def __str__(self) -> str:
        return f"{self.uri}: {self.name}: no answer in {self.tries} tries: {self.reason}"


class StoreAccessError(ArchiveError, PermissionError):
    """A store does not let this process in: credentials are missing or wrong, or lack a right."""

    def __init__(self, uri: str, name: str, reason: str) -> None:
        super().__init__()
        self.args = (uri, name, reason)
        self.uri, self.name, self.reason = uri, name, reason

    def __str__(self) -> str:
        return f"{self.uri}: {self.name}: refused: {self.reason}"


class ManifestError(DicmhError):
    """A Kubernetes manifest cannot be made of these values."""

    def __init__(self, field: str, found: object, wanted: str) -> None:
        super().__init__(field, found, wanted)
        self.field, self.found, self.wanted = field, found, wanted

    def __str__(self) -> str:
        return f"{self.field} is {self.found!r}, wanted {self.wanted}"


class NetError(DicmhError):
    """A net that looks at pictures cannot be used as it is described."""

    def __init__(self, net: str, reason: str) -> None:
        super().__init__(net, reason)
        self.net, self.reason = net, reason

    def __str__(self) -> str:
        return f"net {self.net}: {self.reason}"


class TaskError(DicmhError):
    """A task of an analysis cannot be loaded, or does not keep its contract."""

    def __init__(self, task: str, reason: str) -> None:
        super().__init__(task, reason)
        self.task, self.reason = task, reason

    def __str__(self) -> str:
        return f"task {self.task}: {self.reason}"


class JobError(DicmhError):
    """A job stopped as a whole. What it committed stays; resume continues from there."""


class FailureBudgetError(JobError):
    """More images failed than the job was allowed to lose."""

    def __init__(self, failed: int, done: int, budget: float) -> None:
        super().__init__(failed, done, budget)
        self.failed, self.done, self.budget = failed, done, budget

    def __str__(self) -> str:
        return f"{self.failed} of {self.done} images failed, the budget is {self.budget:g}"


class RayUnavailableError(JobError):
    """There is no Ray to run on: it did not start on this machine, or a cluster does not answer."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return f"Ray at {self.address} is not available: {self.reason}"


class JobStoppedError(JobError):
    """A job, or one worker of it, was told to stop, and did so between two commits."""

    def __init__(self, units_left: int) -> None:
        super().__init__(units_left)
        self.units_left = units_left

    def __str__(self) -> str:
        return (
            f"told to stop with {self.units_left} units left; what is committed stays, "
            "and the same command goes on from there"
        )


class MissingExtraError(DicmhError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(module, extra)
        self.module, self.extra = module, extra

    def __str__(self) -> str:
        return f"{self.module} is needed here: pip install 'dicmh_ray[{self.extra}]'"
