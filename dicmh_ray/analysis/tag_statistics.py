"""How often tags are given, which go together, and what their pictures cost: from the index alone."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pyarrow as pa

from dicmh_ray.analysis.survey import Ground, Survey

_COLUMNS = ("status", "tags", "width", "height", "prefix_bytes")

TAGS_SCHEMA = pa.schema(
    [
        ("tag", pa.string()),
        ("images", pa.int64()),
        ("as_main", pa.int64()),
        ("kept_originals", pa.int64()),
        ("stream_bytes", pa.int64()),
        ("first_state_bytes", pa.int64()),
        ("bpp", pa.float64()),
        ("megapixels", pa.float64()),
        ("min_side", pa.int32()),
        ("max_side", pa.int32()),
    ]
)
PAIRS_SCHEMA = pa.schema(
    [
        ("tag", pa.string()),
        ("other", pa.string()),
        ("images", pa.int64()),
        ("lift", pa.float64()),
    ]
)


@dataclass(slots=True)
class _Sums:
    """Of the pictures of one tag."""

    images: int = 0
    as_main: int = 0
    kept: int = 0
    stream_bytes: int = 0
    first_bytes: int = 0
    stream_pixels: int = 0
    pixels: int = 0
    min_side: int | None = None
    max_side: int | None = None

    def add(self, row: Mapping[str, Any], *, is_main: bool) -> None:
        self.images += 1
        self.as_main += is_main
        self.kept += row["status"] == "kept_original"
        width, height = row["width"], row["height"]
        if width and height:
            self.pixels += width * height
            small, large = sorted((width, height))
            self.min_side = min(small, self.min_side or small)
            self.max_side = max(large, self.max_side or large)
        if row["prefix_bytes"]:
            self.stream_bytes += row["prefix_bytes"][-1]
            self.first_bytes += row["prefix_bytes"][0]
            self.stream_pixels += (width or 0) * (height or 0)


class TagStatistics(Survey):
    """Table ``tags``: a row a tag; the row with the tag null is all pictures. Table ``pairs``: tags
    that stand together, with the lift: how much more often than by chance."""

    name = "tags"
    tables = ("tags", "pairs")

    def __init__(self, *, min_pair_images: int = 2) -> None:
        """
        Args:
            min_pair_images: pairs that fewer pictures have are left out.
        """
        if min_pair_images < 1:
            raise ValueError(f"min_pair_images is {min_pair_images}, wanted 1 or more")
        self.min_pair_images = min_pair_images

    def parameters(self) -> Mapping[str, Any]:
        """The least number of pictures of a pair."""
        return {"min_pair_images": self.min_pair_images}

    def __call__(self, ground: Ground) -> Mapping[str, pa.Table]:
        """See :class:`Survey`."""
        sums: defaultdict[str | None, _Sums] = defaultdict(_Sums)
        sets: Counter[tuple[str, ...]] = Counter()
        for batch in ground.reader.scan(_COLUMNS, ground.where):
            for row in batch.to_pylist():
                tags = row["tags"]
                sums[None].add(row, is_main=False)
                for tag in dict.fromkeys(tags):
                    sums[tag].add(row, is_main=tag == tags[0])
                sets[tuple(sorted(set(tags)))] += 1
        return {"tags": _tags_table(sums), "pairs": self._pairs_table(sums, sets)}

    def _pairs_table(
        self, sums: Mapping[str | None, _Sums], sets: Mapping[tuple[str, ...], int]
    ) -> pa.Table:
        pairs: Counter[tuple[str, str]] = Counter()
        for tags, count in sets.items():
            for pair in combinations(tags, 2):
                pairs[pair] += count
        total = sums[None].images if sums else 0
        rows = [
            {
                "tag": one,
                "other": other,
                "images": count,
                "lift": count * total / (sums[one].images * sums[other].images),
            }
            for (one, other), count in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))
            if count >= self.min_pair_images
        ]
        return pa.Table.from_pylist(rows, schema=PAIRS_SCHEMA)


def _tags_table(sums: Mapping[str | None, _Sums]) -> pa.Table:
    order = sorted(sums, key=lambda tag: (tag is not None, -sums[tag].images, tag or ""))
    rows = [
        {
            "tag": tag,
            "images": one.images,
            "as_main": one.as_main,
            "kept_originals": one.kept,
            "stream_bytes": one.stream_bytes,
            "first_state_bytes": one.first_bytes,
            "bpp": 8 * one.stream_bytes / one.stream_pixels if one.stream_pixels else None,
            "megapixels": one.pixels / 1e6,
            "min_side": one.min_side,
            "max_side": one.max_side,
        }
        for tag, one in ((tag, sums[tag]) for tag in order)
    ]
    return pa.Table.from_pylist(rows, schema=TAGS_SCHEMA)
