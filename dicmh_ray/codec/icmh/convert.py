"""Official weights -> a checkpoint directory, and back. Names and shapes: :mod:`.official_parts`.

Nothing is guessed and nothing passes unexplained: every tensor of the sources is either wanted, in
the shape that the configuration says, or on the list of what lies beside, or the conversion ends.
Files are never unpickled (:mod:`.lightning`). Tensors go from the mapped source to the output one
by one, so that the memory needed is that of the largest, about 0.2 GB at full width; an output
appears under its name when it is whole, or not at all.
"""

import hashlib
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from dicmh_ray.codec.checkpoint import DIFF_ICMH, FORMAT
from dicmh_ray.codec.icmh.config import IcmhConfig
from dicmh_ray.codec.icmh.exact import ExactEntropyModel
from dicmh_ray.codec.icmh.lfgcm import ALIGNMENT, LatentCoder
from dicmh_ray.codec.icmh.lightning import TensorFacts, WeightsFile, open_weights
from dicmh_ray.codec.icmh.noise import NORMAL_LEVELS
from dicmh_ray.codec.icmh.official_parts import (
    LATENT_CODER,
    LATENT_CODER_PREFIX,
    OfficialPart,
    beside,
    control_ratio,
    is_table,
    new_bottleneck_names,
    official_parts,
    old_bottleneck_name,
)
from dicmh_ray.codec.icmh.parts import NORMALS
from dicmh_ray.codec.icmh.text import TOKENIZER_FILES, TOKENIZER_FOLDER, load_tokenizer
from dicmh_ray.codec.icmh.vae import Vae
from dicmh_ray.codec.icmh.whole_files import (
    ByteCount,
    ReportProgress,
    appears_whole,
    check_room,
    flush,
    write_safetensors,
)
from dicmh_ray.codec.noise import normal_table
from dicmh_ray.errors import WeightsError

_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_CHUNK_BYTES = 2**24

TABLES_FILE = "tables.safetensors"

CALIBRATION_PX = 256
"""Sides, at most, of what the entropy model sees of a photograph."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertedPart:
    """One file of the output."""

    num_tensors: int
    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """What a conversion did, or would do."""

    sources: tuple[Path, ...]
    """In the order in which they count: later ones win."""

    source_sha256: tuple[str, ...]
    """64 hex digits of each; empty after a dry run."""

    parts: Mapping[str, ConvertedPart]

    renamed: int
    """Tensors of the entropy bottleneck that had the names of compressai 1.2.4: 14 or 0."""

    overridden: int
    """Wanted tensors that were in more than one source."""

    dropped: Mapping[str, int]
    """Name or prefix -> tensors that were not kept. Entries beside a state dict count as one."""

    missing: tuple[str, ...] = field(default=())
    """Files that the codec wants in the directory and that no weights file holds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Merged:
    """The tensors of all sources, sorted out: by part, official names without prefix."""

    parts: tuple[OfficialPart, ...]
    sources: tuple[WeightsFile, ...]
    owners: dict[str, dict[str, tuple[WeightsFile, str]]]
    """Part -> name -> the file that has it, and the key there."""

    renamed: int
    overridden: int
    dropped: dict[str, int]

    def facts(self, part: str, name: str) -> TensorFacts:
        file, key = self.owners[part][name]
        return file.tensors[key]

    def tensor(self, part: str, name: str) -> Tensor:
        file, key = self.owners[part][name]
        return file.tensor(key)


def convert_official(
    sources: Sequence[Path],
    output: Path,
    *,
    fp16: bool = False,
    config: IcmhConfig | None = None,
    tokenizer: Path | None = None,
    vocabulary: Path | None = None,
    calibration: Sequence[npt.NDArray[np.uint8]] = (),
    drop: Sequence[str] = (),
    dry_run: bool = False,
    report: ReportProgress = lambda *_: None,
) -> ConversionReport:
    """Turn official weights into a checkpoint directory.

    Where a tensor is in several sources, that of the file with the latent coder counts (the
    official ``model.ckpt`` over the Stable Diffusion it was trained from), else the last.

    Args:
        sources: Lightning or Stable Diffusion ``.ckpt``, or ``.safetensors``.
        output: the directory; there must be nothing of that name.
        fp16: halve all weights but the latent coder's.
        config: shapes; None: the official codec at full width. Widths of attention heads leave no
            trace in the weights, hence a configuration cannot be read off them.
        tokenizer: folder with ``vocab.json`` and ``merges.txt``, to be put in as well.
        vocabulary: text file with a word a line, to be put in as well.
        calibration: photographs ``[H, W, 3]``, RGB, on whose middles the integer entropy model of
            our own streams is fitted (``tables.safetensors``). A dozen will do. None: no such file,
            and the directory is for :func:`to_official` and training only.
        drop: prefixes of further tensors that may be left out.
        dry_run: check all names and shapes, and write nothing.
        report: called as bytes are read and written.

    Raises:
        WeightsError: a source is damaged or refused, a tensor is missing, unexpected, of another
            shape, or has no finite values; or the output exists or does not fit on the disk.
        ValueError: no photograph of the calibration has a side of 64 pixels.
        OSError: a file cannot be read or written.
    """
    config = config or IcmhConfig()
    if output.exists() and not dry_run:
        raise WeightsError(str(output), "is there already; nothing was changed")
    before = [_stamp(path) for path in sources]
    merged = _merge(sources, official_parts(config), drop)
    _check_shapes(merged)
    parts = {part.name: _size(part, fp16) for part in merged.parts}
    ordered = tuple(file.path for file in merged.sources)
    missing = [] if len(calibration) else [TABLES_FILE]
    if tokenizer is None:
        missing += [f"{TOKENIZER_FOLDER}/{name}" for name in TOKENIZER_FILES]
    if vocabulary is None:
        missing.append("vocabulary.txt")
    digests: tuple[str, ...] = ()
    if not dry_run:
        total = sum(part.num_bytes for part in parts.values())
        check_room(output, total)
        if tokenizer is not None:
            load_tokenizer(tokenizer)
        total += sum(path.stat().st_size for path in sources)
        progress = ByteCount(report, total)
        digests = tuple(_sha256(path, progress) for path in ordered)
        with appears_whole(output) as folder:
            folder.mkdir()
            for part in merged.parts:
                path = folder / f"{part.name}.safetensors"
                state = _converted(merged, part)
                write_safetensors(path, state, progress, dtype=_part_type(part, fp16))
            if tokenizer is not None:
                (folder / TOKENIZER_FOLDER).mkdir()
                for name in TOKENIZER_FILES:
                    shutil.copyfile(tokenizer / name, folder / TOKENIZER_FOLDER / name)
            if vocabulary is not None:
                shutil.copyfile(vocabulary, folder / "vocabulary.txt")
            _write_config(folder, config, digests, ordered, fp16)
            if len(calibration):
                report(f"fitting tables on {len(calibration)} photographs", total, total)
                _write_tables(folder, config, calibration)
            if [_stamp(path) for path in sources] != before:
                raise WeightsError(str(output), "a source was changed during the conversion")
    return ConversionReport(
        sources=ordered,
        source_sha256=digests,
        parts=parts,
        renamed=merged.renamed,
        overridden=merged.overridden,
        dropped=merged.dropped,
        missing=tuple(missing),
    )


def to_official(
    checkpoint: Path,
    output: Path,
    *,
    new_names: bool = False,
    report: ReportProgress = lambda *_: None,
) -> int:
    """Write the weights of a checkpoint directory as one official state dict.

    The values stay in the precision they have; the official program takes any. What it computes or
    does not read (noise schedule, the last text block) is not in the file: it loads without it.

    Args:
        checkpoint: a directory of this codec; its tables and texts are not needed.
        output: ``.safetensors``, or ``.ckpt`` for ``{"state_dict": ...}`` as Lightning has it. There
            must be nothing of that name.
        new_names: name the entropy bottleneck as compressai 1.2.8 does. The official program pins
            1.2.4, whose names are written otherwise.
        report: called as bytes are written.

    Returns:
        Tensors written.

    Raises:
        WeightsError: the directory is not of this codec, or a tensor is missing, unexpected or of
            another shape.
    """
    if output.exists():
        raise WeightsError(str(output), "is there already; nothing was changed")
    if output.suffix not in (".ckpt", ".safetensors"):
        raise WeightsError(str(output), "wanted a name that ends in .ckpt or .safetensors")
    state: dict[str, Tensor] = {}
    for part in official_parts(read_config(checkpoint)):
        path = checkpoint / f"{part.name}.safetensors"
        file = open_weights(path)
        official = part.to_official({key: file.tensor(key) for key in file.tensors})
        found = {key: tuple(tensor.shape) for key, tensor in official.items()}
        _raise_faults(str(path), "", part.shapes, found)
        for key, tensor in official.items():
            named = key if new_names else old_bottleneck_name(key)
            state[part.prefix + named] = tensor
    total = sum(tensor.nbytes for tensor in state.values())
    check_room(output, total)
    with appears_whole(output) as path:
        if output.suffix == ".ckpt":
            report("writing", 0, total)
            torch.save({"state_dict": state}, path)
            report("writing", total, total)
        else:
            write_safetensors(path, state, ByteCount(report, total))
    return len(state)


def read_config(path: Path) -> IcmhConfig:
    """The shapes of a codec: from a checkpoint directory, its ``config.json``, or such a file.

    Raises:
        WeightsError: they are not there, or not of this codec.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        content = json.loads(path.read_bytes())
        if content.get("codec", DIFF_ICMH) != DIFF_ICMH:
            raise WeightsError(str(path), f"codec is {content['codec']!r}, wanted {DIFF_ICMH!r}")
        return IcmhConfig.from_dict(content.get("network", content))
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise WeightsError(str(path), f"no shapes of a {DIFF_ICMH} codec: {exc!r}") from exc


def _merge(paths: Sequence[Path], parts: tuple[OfficialPart, ...], drop: Sequence[str]) -> _Merged:
    """Open the sources and sort their tensors out.

    Raises:
        WeightsError: two sources have a latent coder, or a tensor is not explained.
    """
    files = [open_weights(path) for path in paths]
    with_codec = [file for file in files if _has_codec(file)]
    if len(with_codec) > 1:
        names = " and ".join(str(file.path) for file in with_codec[:2])
        raise WeightsError(names, "both have a latent coder: which is meant?")
    files.sort(key=_has_codec)  # stable: the others keep their order
    owners: dict[str, dict[str, tuple[WeightsFile, str]]] = {part.name: {} for part in parts}
    dropped: Counter[str] = Counter()
    unknown: list[str] = []
    renamed = overridden = 0
    for file in files:
        source = str(file.path)
        dropped.update(file.ignored)
        new_names = new_bottleneck_names(file.tensors, source)
        renamed += len(new_names)
        for key in file.tensors:
            found = _part_of(new_names.get(key, key), parts)
            if (known := beside(key, drop)) is not None:
                dropped[known] += 1
            elif found is None:
                unknown.append(key)
            elif found[0].unread(found[1]):
                dropped[f"{found[0].prefix}{found[1]}"] += 1
            else:
                part, name = found
                overridden += name in owners[part.name]
                owners[part.name][name] = file, key
        if unknown:
            raise WeightsError(
                source,
                f"{unknown[0]!r} is of no part of the codec and nothing known beside it"
                + _and_more(len(unknown) - 1),
            )
    return _Merged(
        parts=parts,
        sources=tuple(files),
        owners=owners,
        renamed=renamed,
        overridden=overridden,
        dropped=dict(sorted(dropped.items())),
    )


def _has_codec(file: WeightsFile) -> bool:
    return any(key.startswith(LATENT_CODER_PREFIX) for key in file.tensors)


def _part_of(key: str, parts: Iterable[OfficialPart]) -> tuple[OfficialPart, str] | None:
    for part in parts:
        if key.startswith(part.prefix):
            return part, key.removeprefix(part.prefix)
    return None


def _check_shapes(merged: _Merged) -> None:
    """Raise a WeightsError unless every part has its tensors, in their shapes, and no others."""
    where = ", ".join(str(file.path) for file in merged.sources)
    shapes = {
        part.prefix + name: merged.facts(part.name, name).shape
        for part in merged.parts
        for name in merged.owners[part.name]
    }
    ratio = control_ratio(shapes)
    for part in merged.parts:
        found = {}
        for name in merged.owners[part.name]:
            facts = merged.facts(part.name, name)
            is_free = part.name == LATENT_CODER and is_table(name)
            if not is_free and facts.dtype not in _FLOATS:
                raise WeightsError(where, f"{part.prefix + name!r} is of type {facts.dtype}")
            found[name] = part.shapes.get(name, ()) if is_free else facts.shape
        hint = ""
        if part.name == "control" and ratio not in (None, 1.0):
            hint = (
                f"; the control branch is {ratio:g} times as wide as the U-Net: control_model_ratio "
                "of its training. This codec has 1.0, as the released checkpoints"
            )
        if not found:
            raise WeightsError(
                where, f"no tensor begins with {part.prefix!r}: {_ABSENT[part.name]}"
            )
        _raise_faults(where, part.prefix, part.shapes, found, hint)


_ABSENT = {
    LATENT_CODER: "wanted the model.ckpt of Diff-ICMH",
    "control": "wanted the model.ckpt of Diff-ICMH",
    "unet": "give the Stable Diffusion 2.1-base checkpoint as well",
    "vae": "give the Stable Diffusion 2.1-base checkpoint as well",
    "text": "give the Stable Diffusion 2.1-base checkpoint as well",
}


def _raise_faults(
    where: str,
    prefix: str,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    hint: str = "",
) -> None:
    """Raise a WeightsError that names the first difference of two lists of tensors."""
    faults = [f"{prefix + name!r} is missing" for name in wanted if name not in found]
    faults += [f"{prefix + name!r} is unexpected" for name in found if name not in wanted]
    faults += [
        f"{prefix + name!r} is {list(found[name])}, wanted {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if faults:
        raise WeightsError(where, faults[0] + _and_more(len(faults) - 1) + hint)


def _and_more(count: int) -> str:
    return f" (and {count} more like it)" if count else ""


def _converted(merged: _Merged, part: OfficialPart) -> dict[str, Tensor]:
    """The state of our module: views of the sources, and empty tables."""
    official = {}
    for name in part.shapes:
        if part.name == LATENT_CODER and is_table(name):
            dtype = merged.facts(part.name, name).dtype
            official[name] = torch.empty(part.shapes[name], dtype=dtype)
        else:
            official[name] = merged.tensor(part.name, name)
    return part.to_ours(official)


def _part_type(part: OfficialPart, fp16: bool) -> torch.dtype:
    return torch.float16 if fp16 and not part.is_float32 else torch.float32


def _size(part: OfficialPart, fp16: bool) -> ConvertedPart:
    count = sum(math.prod(shape) for shape in part.shapes.values())
    return ConvertedPart(
        num_tensors=len(part.shapes),
        num_parameters=count,
        num_bytes=count * _part_type(part, fp16).itemsize,
    )


def _write_config(
    folder: Path, config: IcmhConfig, digests: Sequence[str], sources: Sequence[Path], fp16: bool
) -> None:
    """``config.json``. It has no names of files nor times: equal weights make equal codecs."""
    content = {
        "format": FORMAT,
        "codec": DIFF_ICMH,
        "network": config.to_dict(),
        "provenance": {
            "converted_from": [
                {"sha256": digest, "bytes": path.stat().st_size}
                for digest, path in zip(digests, sources, strict=True)
            ],
            "precision": "float16" if fp16 else "float32",
        },
    }
    with (folder / "config.json").open("wb") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True).encode() + b"\n")
        flush(file)


def _write_tables(
    folder: Path, config: IcmhConfig, photographs: Sequence[npt.NDArray[np.uint8]]
) -> None:
    """Fit the integer entropy model to the weights in ``folder`` (:mod:`.exact`); with it lies the
    table that noise is made from (:mod:`..noise`)."""
    coder, vae = LatentCoder(config.latent_coder), Vae(config.vae)
    for module, name in ((coder, LATENT_CODER), (vae.network, "vae")):
        state = safetensors.torch.load_file(folder / f"{name}.safetensors")
        floats = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        module.load_state_dict(floats, strict=True)
        module.eval()
    pairs = []
    with torch.inference_mode():
        for crop in map(_middle, photographs):
            if crop.size:
                x = torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255
                pairs.append((x, vae.encode(2 * x - 1)))
    arrays = ExactEntropyModel.fit(coder, pairs).to_arrays()
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    arrays[NORMALS] = normal_table(NORMAL_LEVELS).numpy()
    with (folder / TABLES_FILE).open("wb") as file:
        file.write(safetensors.numpy.save(arrays))
        flush(file)


def _middle(picture: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The middle of a picture, whole multiples of 64 pixels, 256 at most; empty of a small one."""
    sides = [min(side, CALIBRATION_PX) // ALIGNMENT * ALIGNMENT for side in picture.shape[:2]]
    top, left = ((p - side) // 2 for p, side in zip(picture.shape[:2], sides, strict=True))
    return np.ascontiguousarray(picture[top : top + sides[0], left : left + sides[1]])


def _sha256(path: Path, progress: Callable[[str, int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            progress("reading", len(chunk))
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    """Changes when a file does, as far as its file system tells."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns
