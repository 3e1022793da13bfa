"""Weights files of other programs, read without running anything that is in them.

A ``.ckpt`` of PyTorch is a zip: ``data.pkl``, a pickle that describes the tensors, and one stored
member for each tensor storage. Unpickling such a file is calling whatever functions it names, so it
is not done here, not even restricted: ``torch.load(weights_only=True)`` refuses the official files,
whose Lightning callbacks and numpy scalars it does not know, and ``weights_only=False`` runs them.
The pickle is followed on placeholders instead (:mod:`.inert_pickle`), and tensors are views of the
memory-mapped file: what nobody asks for (optimiser states, taggers) is never read.

``.safetensors`` files are read with their own library. What a file is, its first bytes say; its
name does not count.
"""

import mmap
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dicmh_ray.codec.icmh.inert_pickle import InertPickleError, StridedTensor, read_inert
from dicmh_ray.errors import WeightsError

MAX_PICKLE_BYTES = 16 * 2**20
"""The official ``data.pkl`` has about 2 MB. This bounds the memory that placeholders can take."""

_ZIP_MAGIC, _PICKLE_MAGIC = b"PK\x03\x04", b"\x80"
_LOCAL_HEADER = struct.Struct("<4s22xHH")


class TensorFacts(NamedTuple):
    """What a file says of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightsFile(Protocol):
    """An opened file: facts of all its tensors, and each tensor when asked for."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        """Every tensor of the state dict by its key, in the order of the file."""

    @property
    def ignored(self) -> tuple[str, ...]:
        """What lies beside the state dict (``optimizer_states``, ...). Never read."""

    def tensor(self, key: str) -> Tensor:
        """One tensor, as the file has it. It is not to be written to.

        Raises:
            WeightsError: its bytes are not those that were written.
        """


def open_weights(path: Path) -> WeightsFile:
    """Open a Lightning or Stable Diffusion ``.ckpt``, or a ``.safetensors`` file.

    The file must not be changed while it is open: its tensors are its bytes.

    Raises:
        WeightsError: it is none, truncated, of the old format that cannot be read safely, or names
            something that is no part of a checkpoint, such as a function that it wants called.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(9)
    # First, for it has no magic number: the length of its header may begin like the others.
    header_bytes = int.from_bytes(head[:8], "little")
    if len(head) == 9 and head[8:] == b"{" and header_bytes <= path.stat().st_size:
        return _Safetensors(path)
    if head.startswith(_ZIP_MAGIC):
        return _TorchZip(path)
    if head.startswith(_PICKLE_MAGIC):
        raise WeightsError(
            str(path),
            "a bare pickle, torch's format before 1.6, which cannot be read without running it; "
            "where you trust it, load it with torch and save it again",
        )
    raise WeightsError(str(path), f"neither a torch zip nor safetensors: starts with {head!r}")


class _Safetensors:
    """A ``.safetensors`` file."""

    ignored = ()

    def __init__(self, path: Path) -> None:
        self.path = path
        tensors = {}
        try:
            self._file = _open_safetensors(path)
            keys: list[str] = self._file.keys()
            for key in keys:
                part = self._file.get_slice(key)
                tensors[key] = TensorFacts(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
        except SafetensorError as exc:
            raise WeightsError(str(path), f"truncated or damaged safetensors: {exc}") from exc
        except KeyError as exc:
            raise WeightsError(str(path), f"tensors of type {exc} are no weights") from exc
        self.tensors: Mapping[str, TensorFacts] = tensors

    def tensor(self, key: str) -> Tensor:
        facts = self.tensors[key]
        if 0 in facts.shape:  # its memory would be another tensor's, which torch.save minds
            return torch.empty(facts.shape, dtype=facts.dtype)
        return self._file.get_tensor(key)


def _open_safetensors(path: Path) -> Any:
    return safe_open(path, framework="pt")


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Member(NamedTuple):
    """Where a stored member of a zip is."""

    start: int
    size: int
    crc32: int


class _TorchZip:
    """A file that ``torch.save`` wrote, since torch 1.6."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._verified: set[str] = set()
        with path.open("rb") as file:
            # Copy on write, and never written: torch complains of memory that is read-only.
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            try:
                with zipfile.ZipFile(file) as archive:
                    infos = archive.infolist()
            except (zipfile.BadZipFile, ValueError, NotImplementedError) as exc:
                self._fail(f"truncated or damaged: {exc}")
        self._members = self._locate(infos)
        self._folder = self._find_folder()
        if self._members.get(self._folder + "byteorder") and self._read("byteorder") != b"little":
            self._fail("its tensors are not little-endian")
        try:
            content = read_inert(self._read("data.pkl"))
        except InertPickleError as exc:
            self._fail(f"refused: {exc}")
        is_wrapped = isinstance(content, dict) and "state_dict" in content
        state = content["state_dict"] if is_wrapped else content
        self.ignored = tuple(str(key) for key in content if key != "state_dict") * is_wrapped
        if not isinstance(state, dict):
            self._fail("it holds no dictionary of tensors")
        self._places: dict[str, StridedTensor] = {}
        for key, place in state.items():
            if not isinstance(key, str) or not isinstance(place, StridedTensor):
                self._fail(f"entry {key!r} of its state dict is no tensor")
            self._places[key] = place
        self.tensors: Mapping[str, TensorFacts] = {
            key: TensorFacts(place.shape, place.storage.dtype)
            for key, place in self._places.items()
        }

    def tensor(self, key: str) -> Tensor:
        place = self._places[key]
        dtype = place.storage.dtype
        name = f"data/{place.storage.key}"
        member = self._members.get(self._folder + name)
        if member is None or member.size != place.storage.length * dtype.itemsize:
            found = "missing" if member is None else f"{member.size} bytes"
            wanted = place.storage.length * dtype.itemsize
            self._fail(f"storage {name} of {key!r} is {found}, wanted {wanted} bytes")
        if 0 in place.shape:
            return torch.empty(place.shape, dtype=dtype)
        self._verify(name, member)
        start = member.start
        buffer: mmap.mmap | bytearray = self._bytes
        if start % dtype.itemsize:  # torch aligns; other writers need not
            start, buffer = 0, bytearray(self._bytes[start : start + member.size])
        flat = torch.frombuffer(buffer, dtype=dtype, count=place.storage.length, offset=start)
        return flat.as_strided(place.shape, place.strides, place.offset)

    def _locate(self, infos: list[zipfile.ZipInfo]) -> dict[str, _Member]:
        members: dict[str, _Member] = {}
        for info in infos:
            name = info.filename
            if name in members:
                self._fail(f"it has two members {name!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
                self._fail(f"member {name!r} is compressed or encrypted; torch does neither")
            header = self._bytes[info.header_offset : info.header_offset + _LOCAL_HEADER.size]
            if len(header) < _LOCAL_HEADER.size or not header.startswith(_ZIP_MAGIC):
                self._fail(f"member {name!r} is not where the directory says")
            _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
            if start + info.file_size > len(self._bytes):
                self._fail(f"member {name!r} ends behind the file: truncated")
            members[name] = _Member(start, info.file_size, info.CRC)
        return members

    def _find_folder(self) -> str:
        """The folder of all members, with its slash; torch names it as the file was named."""
        pickles = [name for name in self._members if name.count("/") == 1]
        pickles = [name for name in pickles if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            self._fail(f"a zip with {len(pickles)} data.pkl, wanted one: no torch checkpoint")
        return pickles[0].removesuffix("data.pkl")

    def _read(self, name: str) -> bytes:
        member = self._members[self._folder + name]
        if member.size > MAX_PICKLE_BYTES:
            self._fail(f"{name} has {member.size} bytes, at most {MAX_PICKLE_BYTES} are read")
        self._verify(name, member)
        return self._bytes[member.start : member.start + member.size]

    def _verify(self, name: str, member: _Member) -> None:
        if name in self._verified:
            return
        with memoryview(self._bytes) as view, view[member.start :][: member.size] as content:
            actual = zlib.crc32(content)
        if actual != member.crc32:
            self._fail(f"{name} is damaged: CRC-32 {actual:#010x}, written {member.crc32:#010x}")
        self._verified.add(name)

    def _fail(self, reason: str) -> NoReturn:
        raise WeightsError(str(self.path), reason)
