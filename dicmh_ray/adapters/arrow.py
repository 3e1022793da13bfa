"""Arrow: latents as an extension type, and the parts of an archive for any Parquet engine.

    latent_array([...]) ─> column of LatentType ─> Parquet, IPC, Ray, Polars ─> .to_latents()
    part_uris(uri)      ─> SELECT ... FROM read_parquet([...]) in DuckDB, Polars, pandas

The type's storage is a struct of two lists, the values and the shape; a program that does not know
the type sees that. (Arrow's own ``arrow.variable_shape_tensor`` has a list of fixed size for the
shape, and Parquet files of those cannot be read back where a struct is null.)
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dicmh_ray.archive import ARROW_SCHEMA, open_snapshot
from dicmh_ray.views import Archive, open_archive

_LATENT_DIMS = 3
_DECODED_AT_ONCE = 64
_STORAGE = pa.struct(
    [
        pa.field("data", pa.list_(pa.float16())),
        pa.field("shape", pa.list_(pa.int32())),
    ]
)

Latent = npt.NDArray[np.float16]


class LatentArray(pa.ExtensionArray):  # type: ignore[misc]  # pyarrow is untyped
    """A column of latents."""

    def to_latents(self) -> list[Latent | None]:
        """float16 ``[C, h, w]`` of each row, without a copy of the values; None where it is null."""
        lists = self.storage.field("data")
        shapes = self.storage.field("shape")
        values = lists.values.to_numpy(zero_copy_only=False)
        starts = lists.offsets.to_numpy()
        sides = shapes.values.to_numpy()
        firsts = shapes.offsets.to_numpy()
        found: list[Latent | None] = []
        for row, is_valid in enumerate(self.is_valid().to_pylist()):
            if not is_valid:
                found.append(None)
                continue
            shape = sides[firsts[row] : firsts[row + 1]].tolist()
            found.append(values[starts[row] : starts[row + 1]].reshape(shape))
        return found


class LatentScalar(pa.ExtensionScalar):  # type: ignore[misc]  # the same
    """One latent."""

    def as_py(self, **_: Any) -> Latent | None:
        """float16 ``[C, h, w]``; None where it is null."""
        if not self.is_valid:
            return None
        value = self.value
        return np.array(value["data"].values, np.float16).reshape(value["shape"].as_py())


class LatentType(pa.ExtensionType):  # type: ignore[misc]  # the same
    """``dicmh.latent``: float16 ``[C, h, w]``, of another shape in each row if need be."""

    def __init__(self) -> None:
        super().__init__(_STORAGE, "dicmh.latent")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Self:
        if storage_type != _STORAGE:
            raise TypeError(f"dicmh.latent is stored as {_STORAGE}, found {storage_type}")
        return cls()

    def __arrow_ext_class__(self) -> type[LatentArray]:
        return LatentArray

    def __arrow_ext_scalar_class__(self) -> type[LatentScalar]:
        return LatentScalar


pa.register_extension_type(LatentType())


def latent_array(latents: Sequence[Latent | None]) -> LatentArray:
    """A column of latents.

    Args:
        latents: each float16 ``[C, h, w]``, or None for a null.

    Raises:
        ValueError: one has another type or number of dimensions.
    """
    for latent in latents:
        if latent is not None and (latent.dtype != np.float16 or latent.ndim != _LATENT_DIMS):
            raise ValueError(f"a latent is float16 [C, h, w], found {latent.dtype} {latent.shape}")
    present = [latent.ravel() for latent in latents if latent is not None]
    sizes = [0 if latent is None else latent.size for latent in latents]
    shapes = [() if latent is None else latent.shape for latent in latents]
    data = _lists(np.concatenate(present) if present else np.zeros(0, np.float16), sizes)
    dims = [len(shape) for shape in shapes]
    shape = _lists(np.array([side for shape in shapes for side in shape], np.int32), dims)
    mask = pa.array([latent is None for latent in latents], pa.bool_())
    storage = pa.StructArray.from_arrays([data, shape], fields=list(_STORAGE), mask=mask)
    column: LatentArray = pa.ExtensionArray.from_storage(LatentType(), storage)
    return column


def scan_latents(
    archive: Archive | str,
    *,
    columns: Sequence[str] = ("key", "tags"),
    where: str | None = None,
    states: int | None = None,
) -> Iterator[pa.RecordBatch]:
    """The latents of the matching rows, beside some small columns: one batch a row group.

    Rows without a bitstream have no latent and are left out.

    Args:
        archive: as :func:`dicmh_ray.open_archive` gives it, or its address.
        columns: small columns of the archive that go before the ``latent``.
        where: filter, see :func:`dicmh_ray.reader.parse_where`.
        states: decode from the first ones only, and read no bytes of the others.

    Raises:
        WhereError: the filter is wrong.
        CorruptRowError, CorruptObjectError: what is stored is damaged.
    """
    if isinstance(archive, str):
        archive = open_archive(archive)
    coded = "num_states > 0" if where is None else f"num_states > 0 and ({where})"
    for batch in archive.reader.scan([*columns, "base", "detail"], coded, states):
        streams = [
            base + detail
            for base, detail in zip(
                batch["base"].to_pylist(), batch["detail"].to_pylist(), strict=True
            )
        ]
        latents = latent_array(
            [
                latent
                for start in range(0, len(streams), _DECODED_AT_ONCE)
                # The bytes end after the states asked for: rows may well have fewer.
                for latent in archive.codec.decode_latent(streams[start : start + _DECODED_AT_ONCE])
            ]
        )
        kept = [name for name in ARROW_SCHEMA.names if name in columns]
        yield pa.RecordBatch.from_arrays(
            [*(batch[name] for name in kept), latents],
            schema=pa.schema(
                [*(batch.schema.field(name) for name in kept), pa.field("latent", LatentType())]
            ),
        )


def part_uris(
    uri: str,
    *,
    version: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Addresses of the Parquet files that hold the rows of an archive, in row order.

    A glob over ``data/`` is no substitute: parts of attempts that lost lie there too, until they
    are collected. Engines that read them know nothing of the rows' checksums.

    Args:
        uri: address of the archive.
        version: of the archive; None is the newest.
        storage_options: passed to fsspec.

    Raises:
        ArchiveNotFoundError: there is no archive.
    """
    snapshot = open_snapshot(uri, version=version, storage_options=storage_options)
    return [f"{uri.rstrip('/')}/{part.name}" for part in snapshot.parts]


def _lists(values: npt.NDArray[Any], sizes: Sequence[int]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
