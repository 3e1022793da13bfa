"""The checkpoint inside the archive: ``codec/<codec_id>/`` and the list that covers it."""

from collections.abc import Mapping
from dataclasses import asdict

from dicmh_ray.archive.commit import ObjectFacts
from dicmh_ray.archive.sealed import seal, unseal
from dicmh_ray.archive.store import Store, check_name
from dicmh_ray.errors import CorruptObjectError

CODEC_PREFIX = "codec/"
FILES_FORMAT = "dicmh.archive.codec"
FILES_VERSION = 1


def files_name(codec_id: str) -> str:
    """Object name of the list of a checkpoint's files."""
    return f"{CODEC_PREFIX}{codec_id}/files.json"


def write_codec_files(store: Store, codec_id: str, files: Mapping[str, bytes]) -> bytes:
    """Put a checkpoint's files, then their list: a list that exists is complete.

    A list that is there already stands, as long as it names no other bytes: when a job is resumed
    after an upgrade, the same codec may come with companions it did not have, such as a tagger.

    Returns:
        The bytes of the list.

    Raises:
        CorruptObjectError: other bytes are stored under one of the names.
    """
    folder = f"{CODEC_PREFIX}{codec_id}/"
    # One file in memory at a time: some checkpoints are gigabytes.
    facts = [ObjectFacts.of(check_name(folder + name), files[name]) for name in sorted(files)]
    body = {"codec_id": codec_id, "files": [asdict(file) for file in facts]}
    listing = seal(FILES_FORMAT, FILES_VERSION, body)
    name = files_name(codec_id)
    if name.removeprefix(folder) in files:
        raise ValueError(f"a checkpoint may not have a file of the name {name!r}")
    try:
        present = store.get(name)
    except FileNotFoundError:
        present = b""
    if present:
        known = {file.name: file for file in list_codec_files(codec_id, present)}
        for file in facts:
            if known.get(file.name, file) != file:
                raise CorruptObjectError(file.name, "holds other bytes than this job's checkpoint")
        return present
    for file in facts:
        if not store.put_once(file.name, files[file.name.removeprefix(folder)]):
            raise CorruptObjectError(file.name, "holds other bytes than this job's checkpoint")
    if not store.put_once(name, listing):
        raise CorruptObjectError(name, "holds other bytes than this job's checkpoint")
    return listing


def list_codec_files(codec_id: str, listing: bytes) -> tuple[ObjectFacts, ...]:
    """The files of a checkpoint, from the bytes of ``files.json``.

    Raises:
        CorruptObjectError: the bytes are not the list of that checkpoint's files.
    """
    name = files_name(codec_id)
    body = unseal(name, listing, FILES_FORMAT, FILES_VERSION)
    try:
        files = tuple(ObjectFacts(**facts) for facts in body["files"])
        found = body["codec_id"]
    except (KeyError, TypeError) as exc:
        raise CorruptObjectError(name, f"not a list of codec files: {exc!r}") from exc
    if found != codec_id:
        raise CorruptObjectError(name, f"lists the files of codec {str(found)[:16]}")
    for file in files:
        check_name(file.name)
        if not file.name.startswith(f"{CODEC_PREFIX}{codec_id}/"):
            raise CorruptObjectError(name, f"lists {file.name!r}, outside its folder")
    return files


def read_codec_files(store: Store, codec_id: str) -> dict[str, bytes]:
    """The checkpoint that wrote an archive, by file name, every byte verified.

    Raises:
        CorruptObjectError: a file is missing or damaged.
    """
    contents = {}
    name = files_name(codec_id)
    try:
        for facts in list_codec_files(codec_id, store.get(name)):
            name = facts.name
            data = store.get(name)
            if ObjectFacts.of(name, data) != facts:
                raise CorruptObjectError(name, "content does not match its SHA-256")
            contents[name.removeprefix(f"{CODEC_PREFIX}{codec_id}/")] = data
    except FileNotFoundError as exc:
        raise CorruptObjectError(name, "is missing") from exc
    return contents
