"""A checkpoint: the directory that holds everything which changes decoded pixels.

``config.json`` (parts, widths, state schedule), ``weights.safetensors`` (the networks) and
``tables.safetensors`` (integer context weights and CDF tables). Its identity, the ``codec_id``,
is a SHA-256 over the names and contents of these files. Any further file in the directory (licences,
attributions) travels with it without changing its identity; so do the specification of the formats
and a reference decoder, which every archive gets.

Reading a checkpoint needs no torch: archives bundle and verify it without being able to decode.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicmh_ray.errors import WeightsError

DEFAULT_CHECKPOINT = "default"
"""Name of the checkpoint in the package."""

IDENTITY_FILES = ("config.json", "tables.safetensors", "weights.safetensors")
"""The files that the codec_id covers, in the order in which they are hashed."""

TAGGER_FILE = "tagger.safetensors"
"""A further file that some checkpoints have: their tagger. No part of the identity."""

FORMAT = "dicmh-checkpoint/1"

LATENT_UNIT = "latent_unit"
"""Tensor among the weights: float32 ``[C]``, what y was multiplied by before rounding."""

COMPANIONS = ("formats/bitstream.v1.md", "formats/layered-payload.v1.md", "reference_decoder.py")
"""What else a reader needs in fifty years; lies beside this module."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The files of a checkpoint and what they say of themselves."""

    codec_id: str
    """SHA-256 over :data:`IDENTITY_FILES`, 64 hex digits."""

    num_states: int
    """States of a full stream."""

    config: dict[str, Any]
    """The parsed ``config.json``."""

    files: dict[str, bytes]
    """Relative name -> content of every file and companion: what an archive bundles."""


def checkpoint_directory(checkpoint: str | Path) -> Path:
    """Where a checkpoint lies: the one in the package for ``"default"``, else the path itself."""
    if checkpoint == DEFAULT_CHECKPOINT:
        return Path(__file__).parent / "checkpoints" / DEFAULT_CHECKPOINT
    return Path(checkpoint)


def read_checkpoint(checkpoint: str | Path = DEFAULT_CHECKPOINT) -> Checkpoint:
    """Read a checkpoint directory whole and compute its identity.

    Raises:
        WeightsError: a file is missing or ``config.json`` is not a checkpoint's.
    """
    directory = checkpoint_directory(checkpoint)
    if not directory.is_dir():
        raise WeightsError(str(checkpoint), f"{directory} is not a directory")
    files = {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    for name in COMPANIONS:
        files.setdefault(name, (Path(__file__).parent / name).read_bytes())
    missing = [name for name in IDENTITY_FILES if name not in files]
    if missing:
        raise WeightsError(str(checkpoint), f"{', '.join(missing)} missing in {directory}")
    try:
        config = json.loads(files["config.json"])
        found = config["format"]
        num_states = int(config["network"]["num_states"])
    except (ValueError, KeyError, TypeError) as exc:
        raise WeightsError(str(checkpoint), "config.json is no checkpoint's") from exc
    if found != FORMAT:
        raise WeightsError(str(checkpoint), f"format is {found!r}, wanted {FORMAT!r}")
    return Checkpoint(codec_id=identity(files), num_states=num_states, config=config, files=files)


def identity(files: dict[str, bytes]) -> str:
    """The codec_id of a checkpoint's files: SHA-256 over ``name, NUL, SHA-256(content)`` of each."""
    digest = hashlib.sha256()
    for name in IDENTITY_FILES:
        digest.update(name.encode() + b"\0" + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()
