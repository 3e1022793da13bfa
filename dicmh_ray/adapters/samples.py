"""What a row becomes in a sample: the view that was asked for, and what the row says of itself.

training      {"key": ..., "image": uint8 [H, W, 3], "tags": [...]}
WebDataset    {"__key__": ..., "png": bytes, "json": bytes}
"""

import io
import json
import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np

from dicmh_ray.archive import SMALL_COLUMNS, EncodedImage
from dicmh_ray.views import VIEWS, ImageView, mark_of, save_picture
from dicmh_ray.views.decode import is_generated, states_for

_FACTS = (
    "key",
    "status",
    "error",
    "tags",
    "tag_scores",
    "width",
    "height",
    "bpp",
    "tier",
    "psnr",
    "worst_tile_psnr",
    "ms_ssim",
    "num_states",
    "source_uri",
    "source_offset",
    "original_sha256",
    "original_bytes",
    "original_format",
)
_LISTS = frozenset({"tags", "tag_scores", "prefix_bytes"})


def facts_of(
    row: EncodedImage, *, view: str = "machine", states: int | None = None
) -> dict[str, Any]:
    """A row's small columns and how its picture was made, as JSON.

    Args:
        row: with its small columns; blobs are not looked at.
        view: that the facts go with.
        states: that it was decoded from; None is all.

    Returns:
        ``decoded`` says which view of how many states this is, and whether its detail is
        ``generated``; a row without a bitstream shows its original whatever was asked for.
    """
    facts = {name: _plain(row, name) for name in _FACTS}
    facts["metadata"] = json.loads(row.metadata)
    facts["decoded"] = {"view": "original", "states": 0, "generated": False}
    if row.prefix_bytes and view != "original":
        used = min(states_for(view, states) or len(row.prefix_bytes), len(row.prefix_bytes))
        facts["decoded"] = {"view": view, "states": used, "generated": is_generated(row, view)}
    return facts


def json_bytes(facts: dict[str, Any]) -> bytes:
    """Facts as UTF-8 text, the same for the same facts."""
    return json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()


def field_of(view: str) -> str:
    """Name of a view in a sample: ``latent``, ``original``, or ``image`` for every picture."""
    return view if view in ("latent", "original") else "image"


def with_view(where: str | None, view: str) -> str:
    """A filter for the rows that have a view at all; damage is another matter.

    Rows that hold neither a stream nor an original are no samples. A view ``original`` is there
    where the policy kept it, which only reading tells of rows that have a stream too.
    """
    has_view = "num_states > 0" if view == "latent" else "status != 'failed'"
    return has_view if where is None else f"{has_view} and ({where})"


def check_sample(view: str, columns: Sequence[str]) -> None:
    """Refuse what no sample can be.

    Raises:
        ValueError: ``view`` is none, or a column is not one of the small ones.
    """
    if view not in VIEWS or view == "tags":
        wanted = ", ".join(name for name in VIEWS if name != "tags")
        raise ValueError(f"view is {view!r}, wanted one of {wanted}")
    unknown = sorted(set(columns) - set(SMALL_COLUMNS))
    if unknown:
        raise ValueError(f"no such columns: {unknown}")


def sample_of(row: EncodedImage, columns: Sequence[str], view: str, result: Any) -> dict[str, Any]:
    """A sample for training: some columns, ``metadata`` as an object, and a decoded view."""
    return {**{name: _plain(row, name) for name in columns}, field_of(view): result}


def held_view(image: ImageView, view: str, states: int | None) -> Any:
    """A view of an image; of one out of :meth:`Archive.iter` it is decoded already."""
    if view == "latent":
        return image.latent(states)
    if view == "original":
        return image.original
    return image.thumbnail(states=states) if view == "thumbnail" else image.pixels(view, states)


def webdataset_sample(
    row: EncodedImage,
    result: Any,
    *,
    view: str = "machine",
    states: int | None = None,
    format: str | None = "png",
) -> dict[str, Any]:
    """One image as a sample of WebDataset: what its tars hold, and what its pipelines pass on.

    Args:
        row: with its small columns.
        result: its decoded view: a picture, a latent, or the original's bytes.
        view: which one that is.
        states: that it was decoded from; None is all.
        format: of pictures: ``png``, ``jpg`` or ``webp``, marked as :meth:`ImageView.save` does;
            None leaves arrays and JSON decoded, as a pipeline has them behind ``.decode()``.

    Returns:
        ``__key__`` and two fields: the picture under its format (``npy`` for a latent, the
        original's own suffix for an original, ``image`` or ``latent`` when nothing is encoded),
        and ``json``, see :func:`facts_of`.
    """
    facts = facts_of(row, view=view, states=states)
    key = {"__key__": webdataset_key(row.key)}
    if format is None:
        return {**key, field_of(view): result, "json": facts}
    if view == "original":
        return {**key, _suffix_of(row): result, "json": json_bytes(facts)}
    sink = io.BytesIO()
    if view == "latent":
        np.save(sink, result, allow_pickle=False)
        return {**key, "npy": sink.getvalue(), "json": json_bytes(facts)}
    save_picture(sink, result, mark_of(row, view), format=format)
    return {**key, format: sink.getvalue(), "json": json_bytes(facts)}


def webdataset_key(key: str) -> str:
    """A row's key as the name of tar members: a dot in a file's name would end it there."""
    folder, name = posixpath.split(key)
    return posixpath.join(folder, name.replace("%", "%25").replace(".", "%2E"))


def _suffix_of(row: EncodedImage) -> str:
    kind = (row.original_format or "bin").lower()
    return {"jpeg": "jpg", "tiff": "tif"}.get(kind, kind)


def _plain(row: EncodedImage, name: str) -> Any:
    value = getattr(row, name)
    if name == "metadata":
        return json.loads(value)
    return list(value) if name in _LISTS else value
