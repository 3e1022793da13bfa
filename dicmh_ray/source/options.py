"""How sources are planned and read. Every limit here bounds what a hostile file can cost."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

_MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """Settings of :func:`plan_units` and :func:`read_unit`; the same object must serve both."""

    image_column: str | None = None
    """Parquet column that holds the images; None finds it by name, then by type."""

    key_column: str | None = None
    """Parquet column that holds the keys; None finds it by name, else keys are row numbers."""

    key_prefix: Literal["auto", "none"] = "auto"
    """``auto``: with several tars or Parquet files, keys start with the file's name, so that they
    are unique in the archive. ``none``: keys stay as they are; the caller knows them unique."""

    tag_fields: tuple[str, ...] = ()
    """Metadata fields whose values become tags: ``"cls"``, ``"labels"``, ``"json.scene.labels"``."""

    max_tags: int = 64
    """Tags of one image, 256 at most; the rest stay in the metadata only."""

    max_tag_bytes: int = 128
    """UTF-8 length of one tag, 255 at most; longer values are cut at a character."""

    max_image_bytes: int = 256 * _MEBIBYTE
    """A larger image is not read: its row says so."""

    max_member_bytes: int = 512 * _MEBIBYTE
    """All tar members of one sample together; what would exceed it is not read, the row says so."""

    max_header_bytes: int = _MEBIBYTE
    """Long names and pax records in front of one tar member."""

    max_metadata_bytes: int = _MEBIBYTE
    """Sidecars and columns kept for one image; others are listed under ``__dropped__``."""

    max_unpacked_ratio: int = 200
    """Bytes out for each byte in of a compressed tar, beyond the first 64 MiB."""

    unit_bytes: int = 256 * _MEBIBYTE
    """Source bytes of one unit of files or row groups. A killed worker loses at most one unit."""

    files_per_unit: int = 1024
    """Image files of one unit."""

    block_bytes: int = 4 * _MEBIBYTE
    """Bytes of one request to the store."""

    num_retries: int = 5
    """Attempts to go on after a transient error without a byte read in between."""

    retry_base_s: float = 0.2
    """First pause before a new attempt; it doubles each time, with jitter, up to 10 s."""

    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Passed to fsspec. May hold credentials: never part of ``repr`` or :meth:`to_dict`."""

    def __post_init__(self) -> None:
        if self.key_prefix not in ("auto", "none"):
            raise ValueError(f"key_prefix is {self.key_prefix!r}, wanted 'auto' or 'none'")
        for limit in dataclasses.fields(self):
            value = getattr(self, limit.name)
            if limit.type is int and value < (0 if limit.name == "num_retries" else 1):
                raise ValueError(f"{limit.name} is {value}, wanted a positive number")
        if self.max_tags > 256 or self.max_tag_bytes > 255:
            raise ValueError("a bitstream holds 256 tags of 255 bytes at most")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without ``storage_options``: plans are public, credentials are not."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "storage_options"]
        values = {name: getattr(self, name) for name in names}
        return values | {"tag_fields": list(self.tag_fields)}

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, storage_options: Mapping[str, Any] | None = None
    ) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: a key is unknown.
        """
        known = {f.name for f in dataclasses.fields(cls)} - {"storage_options"}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown source options: {', '.join(unknown)}")
        fields = dict(values) | {"tag_fields": tuple(values.get("tag_fields", ()))}
        return cls(**fields, storage_options=storage_options or {})
