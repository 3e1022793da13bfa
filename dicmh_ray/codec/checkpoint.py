"""A checkpoint: the directory that holds everything which changes decoded pixels.

``config.json`` says which codec it is for and the shapes of its networks; safetensors files hold the
weights and integer tables, text files vocabularies. Its identity, the ``codec_id``, is a SHA-256
over the names and contents of these files (:data:`IDENTITY_FILES`). Any further file in the
directory (licences, attributions) travels with it without changing its identity; so do the
specification of the formats and, for the layered codec, a reference decoder.

Reading a checkpoint needs no torch: archives bundle and verify it without being able to decode.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dicmh_ray.errors import WeightsError

DEFAULT_CHECKPOINT = "default"
"""Name of the checkpoint in the package."""

LAYERED, DIFF_ICMH = "layered", "diff-icmh"
"""Values of ``codec`` in ``config.json``; a checkpoint that names none is the first."""

IDENTITY_FILES: Mapping[str, Mapping[str, bool]] = {
    LAYERED: {"config.json": True, "tables.safetensors": True, "weights.safetensors": True},
    DIFF_ICMH: {
        "config.json": True,
        "control.safetensors": False,
        "latent_coder.safetensors": True,
        "tables.safetensors": True,
        "text.safetensors": False,
        "tokenizer/merges.txt": False,
        "tokenizer/vocab.json": False,
        "unet.safetensors": False,
        "vae.safetensors": True,
        "vocabulary.txt": False,
    },
}
"""For each codec the files that its codec_id covers, in the order in which they are hashed, and
whether one must be there."""

TAGGER_FILE = "tagger.safetensors"
"""A further file that some checkpoints have: their tagger. No part of the identity."""

FORMAT = "dicmh-checkpoint/1"

LAYERED_CODER = "layered/2"
"""Value of ``coder`` in a layered checkpoint's ``config.json``: the layout of its payloads."""

LAYERED_CODERS = ("layered/1", LAYERED_CODER)
"""Those that are read."""

LATENT_UNIT = "latent_unit"
"""Tensor among the weights: float32 ``[C]``, what y was multiplied by before rounding."""

COMPANIONS: Mapping[str, tuple[str, ...]] = {
    LAYERED: (
        "formats/bitstream.v1.md",
        "formats/layered-payload.v1.md",
        "formats/layered-payload.v2.md",
        "reference_decoder.py",
    ),
    DIFF_ICMH: ("formats/bitstream.v1.md", "formats/lfgcm-payload.v1.md"),
}
"""What else a reader needs in fifty years; lies beside this module."""


class FilesOnDisk(Mapping[str, bytes]):
    """Contents of files by name, read when asked for: some checkpoints are gigabytes."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = dict(paths)

    def __getitem__(self, name: str) -> bytes:
        return self.paths[name].read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __reduce__(self) -> tuple[type[dict[str, bytes]], tuple[dict[str, bytes]]]:
        """Contents travel: the paths mean nothing on another machine."""
        return dict, (dict(self),)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The files of a checkpoint and what they say of themselves."""

    name: str
    """What it was asked for by; errors name it."""

    codec_id: str
    """SHA-256 over its codec's :data:`IDENTITY_FILES`, 64 hex digits."""

    codec: str
    """:data:`LAYERED` or :data:`DIFF_ICMH`."""

    num_states: int
    """States of a full stream."""

    config: dict[str, Any]
    """The parsed ``config.json``."""

    files: FilesOnDisk = field(repr=False)
    """Relative name -> content of every file and companion: what an archive bundles."""

    @property
    def teachers(self) -> list[dict[str, Any]]:
        """Nets whose features were a loss in training, as its provenance names them."""
        told = self.config.get("provenance", {}).get("teacher") or []
        return told if isinstance(told, list) else [told]


def checkpoint_directory(checkpoint: str | Path) -> Path:
    """Where a checkpoint lies: the one in the package for ``"default"``, else the path itself."""
    if checkpoint == DEFAULT_CHECKPOINT:
        return Path(__file__).parent / "checkpoints" / DEFAULT_CHECKPOINT
    return Path(checkpoint)


def begin_checkpoint(folder: Path) -> None:
    """Make a folder ready for a checkpoint's files, of which ``config.json`` is written last.

    Until then the folder is no checkpoint: files of two never pass for one, whenever a writer is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)


def read_checkpoint(checkpoint: str | Path = DEFAULT_CHECKPOINT) -> Checkpoint:
    """Read a checkpoint directory whole and compute its identity.

    Raises:
        WeightsError: a file is missing or ``config.json`` is not a checkpoint's.
    """
    directory = checkpoint_directory(checkpoint)
    name = str(checkpoint)
    if not directory.is_dir():
        raise WeightsError(name, f"{directory} is not a directory")
    paths = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    if "config.json" not in paths:
        raise WeightsError(name, f"config.json missing in {directory}")
    try:
        config = json.loads(paths["config.json"].read_bytes())
        found = config["format"]
        codec = config.get("codec", LAYERED)
        num_states = int(config["network"]["num_states"]) if codec == LAYERED else 1
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(name, "config.json is no checkpoint's") from exc
    if found != FORMAT:
        raise WeightsError(name, f"format is {found!r}, wanted {FORMAT!r}")
    if codec not in IDENTITY_FILES:
        raise WeightsError(name, f"codec is {codec!r}, wanted {' or '.join(IDENTITY_FILES)}")
    missing = [
        file for file, needed in IDENTITY_FILES[codec].items() if needed and file not in paths
    ]
    if missing:
        raise WeightsError(name, f"{', '.join(missing)} missing in {directory}")
    for companion in COMPANIONS[codec]:
        paths.setdefault(companion, Path(__file__).parent / companion)
    files = FilesOnDisk(paths)
    return Checkpoint(
        name=name,
        codec_id=_identity(codec, files),
        codec=codec,
        num_states=num_states,
        config=config,
        files=files,
    )


def _identity(codec: str, files: FilesOnDisk) -> str:
    """SHA-256 over ``name, NUL, SHA-256(content)`` of each file that there is."""
    digest = hashlib.sha256()
    for name in IDENTITY_FILES[codec]:
        if name in files:
            with files.paths[name].open("rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
            digest.update(name.encode() + b"\0" + content)
    return digest.hexdigest()
