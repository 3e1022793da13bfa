"""What a row says of itself as JSON, wherever a picture of it goes: files, tars, streams."""

import json
from typing import Any

from dicmh_ray.archive import EncodedImage
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
    facts = {name: getattr(row, name) for name in _FACTS}
    facts["tags"] = list(row.tags)
    facts["tag_scores"] = list(row.tag_scores)
    facts["metadata"] = json.loads(row.metadata)
    if row.prefix_bytes:
        used = min(states_for(view, states) or len(row.prefix_bytes), len(row.prefix_bytes))
        generated = is_generated(row, view)
        facts["decoded"] = {"view": view, "states": used, "generated": generated}
    else:
        facts["decoded"] = {"view": "original", "states": 0, "generated": False}
    return facts


def json_bytes(facts: dict[str, Any]) -> bytes:
    """Facts as UTF-8 text, the same for the same facts."""
    return json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
