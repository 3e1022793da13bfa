"""The networks of one Diff-ICMH codec, and the checkpoint directory they live in.

config.json                 shapes (IcmhConfig), provenance
latent_coder.safetensors    float32: its entropy parameters decide what a stream means
tables.safetensors          the same parameters as integers (:mod:`.exact`), which is what is used
vae.safetensors             float32 or float16
unet, control, text .safetensors, tokenizer/      the human view; may be left out together
vocabulary.txt              words that streams name by number; may be left out
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor, nn

from dicmh_ray.codec.checkpoint import (
    DIFF_ICMH,
    FORMAT,
    Checkpoint,
    begin_checkpoint,
    read_checkpoint,
)
from dicmh_ray.codec.icmh.config import IcmhConfig
from dicmh_ray.codec.icmh.control import ControlledUNet
from dicmh_ray.codec.icmh.exact import ExactEntropyModel
from dicmh_ray.codec.icmh.lfgcm import LatentCoder
from dicmh_ray.codec.icmh.noise import NORMAL_LEVELS, check_normals
from dicmh_ray.codec.icmh.sampling import Sampler
from dicmh_ray.codec.icmh.text import TOKENIZER_FILES, TextEncoder, load_tokenizer
from dicmh_ray.codec.icmh.vae import Vae
from dicmh_ray.codec.noise import normal_table
from dicmh_ray.codec.vocabularies import VOCABULARY_FILE, parse_vocabulary, save_vocabulary
from dicmh_ray.errors import WeightsError
from dicmh_ray.tags import Vocabulary

HUMAN_FILES = (
    "control.safetensors",
    "text.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet.safetensors",
)
"""What the human view needs beyond the machine view."""

NORMALS = "normals"
"""Array among the tables: float32, the normal table of the human view's noise."""


@dataclass(kw_only=True, slots=True)
class Parts:
    """The networks, on any device; in evaluation mode unless something trains them."""

    config: IcmhConfig
    vae: Vae
    latent_coder: LatentCoder
    restorer: ControlledUNet | None = None
    text: TextEncoder | None = None

    def generative(self) -> tuple[ControlledUNet, TextEncoder]:
        """Restorer and text encoder. Raises WeightsError where the codec has none."""
        if self.restorer is None or self.text is None:
            raise WeightsError("Diff-ICMH", "it has no U-Net, control branch and text encoder")
        return self.restorer, self.text

    def modules(self) -> dict[str, nn.Module]:
        """Name of the file without its ending -> the module that it holds."""
        found: dict[str, nn.Module] = {"latent_coder": self.latent_coder, "vae": self.vae.network}
        if self.restorer is not None and self.text is not None:
            found["unet"] = self.restorer.unet
            found["control"] = self.restorer.control
            found["text"] = self.text
        return found


def has_human_view(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint has all files of the human view.

    Raises:
        WeightsError: it has some of them.
    """
    missing = [name for name in HUMAN_FILES if name not in checkpoint.files]
    if missing and len(missing) < len(HUMAN_FILES):
        raise WeightsError(checkpoint.name, f"{', '.join(missing)} missing: no human view")
    return not missing


def build_parts(config: IcmhConfig, tokenizer_folder: Path | None) -> Parts:
    """Networks with random weights; those of the human view where there is a tokenizer.

    Raises:
        WeightsError: the tokenizer cannot be read, or has more tokens than the text encoder.
    """
    parts = Parts(config=config, vae=Vae(config.vae), latent_coder=LatentCoder(config.latent_coder))
    if tokenizer_folder is not None:
        parts.restorer = ControlledUNet(config.restorer, config.latent_coder.latent_channels)
        parts.text = TextEncoder(config.text, load_tokenizer(tokenizer_folder))
    return parts


def read_config(checkpoint: Checkpoint) -> IcmhConfig:
    """The shapes of a checkpoint. Raises WeightsError when they are not Diff-ICMH's."""
    try:
        return IcmhConfig.from_dict(checkpoint.config["network"])
    except (KeyError, TypeError, AttributeError) as exc:
        raise WeightsError(checkpoint.name, f"config.json: {exc!r}") from exc


def load_machine_parts(checkpoint: Checkpoint) -> Parts:
    """VAE and latent coder of a checkpoint, float32, every tensor accounted for.

    Raises:
        WeightsError: a tensor is missing, unexpected, of another shape or not finite.
    """
    config = read_config(checkpoint)
    with _shapes_of(checkpoint):
        parts = build_parts(config, None)
    for name, module in parts.modules().items():
        _fill(module, checkpoint, name)
    return parts


def load_human_parts(checkpoint: Checkpoint, parts: Parts) -> None:
    """Add restorer and text encoder to the parts. Raises as :func:`load_machine_parts`."""
    config = parts.config
    # Built without memory: the U-Net and its branch have over a thousand million parameters.
    with _shapes_of(checkpoint), torch.device("meta"):
        restorer = ControlledUNet(config.restorer, config.latent_coder.latent_channels)
    tokenizer = load_tokenizer(checkpoint.files.paths[HUMAN_FILES[2]].parent)
    with _shapes_of(checkpoint):
        text = TextEncoder(config.text, tokenizer)
    for name, module in (("unet", restorer.unet), ("control", restorer.control), ("text", text)):
        _fill(module, checkpoint, name)
    parts.restorer, parts.text = restorer.eval().requires_grad_(requires_grad=False), text


def load_arrays(checkpoint: Checkpoint) -> dict[str, npt.NDArray[Any]]:
    """The integer tables of a checkpoint."""
    try:
        arrays: dict[str, npt.NDArray[Any]] = safetensors.numpy.load(
            checkpoint.files["tables.safetensors"]
        )
    except safetensors.SafetensorError as exc:
        raise WeightsError(checkpoint.name, f"tables.safetensors: {exc}") from exc
    return arrays


def load_tables(
    checkpoint: Checkpoint, config: IcmhConfig
) -> tuple[ExactEntropyModel, npt.NDArray[np.float32]]:
    """The integer entropy model of a checkpoint, and the normals of its noise.

    Raises:
        WeightsError: an array is missing or breaks an invariant, or they are another codec's.
    """
    arrays = load_arrays(checkpoint)
    if NORMALS not in arrays:
        raise WeightsError(checkpoint.name, f"tables.safetensors: {NORMALS} missing")
    normals = check_normals(arrays.pop(NORMALS), checkpoint.name)
    exact = ExactEntropyModel.from_arrays(arrays)
    found = exact.y_channels, exact.z_channels
    wanted = config.latent_coder.y_channels, config.latent_coder.z_channels
    if found != wanted:
        raise WeightsError(
            checkpoint.name, f"tables.safetensors are of {found} channels, wanted {wanted}"
        )
    return exact, normals


def load_sampler(checkpoint: Checkpoint, config: IcmhConfig) -> Sampler:
    """The sampler of a checkpoint. Raises WeightsError when there is no such."""
    with _shapes_of(checkpoint):
        return Sampler(config.sampler)


def load_vocabulary(checkpoint: Checkpoint) -> Vocabulary | None:
    """The words that a checkpoint's streams name by number, if it has such."""
    if VOCABULARY_FILE not in checkpoint.files:
        return None
    return parse_vocabulary(checkpoint.files[VOCABULARY_FILE], VOCABULARY_FILE)


def write_icmh_checkpoint(
    parts: Parts,
    arrays: Mapping[str, npt.NDArray[Any]],
    folder: Path,
    *,
    provenance: Mapping[str, Any],
    vocabulary: Vocabulary | None = None,
    is_half: bool = True,
) -> Checkpoint:
    """Write a checkpoint directory.

    Args:
        parts: those of the human view may be missing.
        arrays: ``ExactEntropyModel.to_arrays`` of this latent coder.
        folder: created if needed; files of the same names are replaced. Where the parts have a text
            encoder, its tokenizer must lie there already.
        provenance: how the checkpoint came to be; goes into ``config.json``.
        vocabulary: words that its streams name by number.
        is_half: weights other than the latent coder's in float16.
    """
    begin_checkpoint(folder)
    for name, module in parts.modules().items():
        half = is_half and name != "latent_coder"
        state = {k: _stored(v, half) for k, v in module.state_dict().items()}
        (folder / f"{name}.safetensors").write_bytes(safetensors.torch.save(state))
    tables = {NORMALS: normal_table(NORMAL_LEVELS).numpy()} | dict(arrays)
    contiguous = {name: np.ascontiguousarray(array) for name, array in tables.items()}
    (folder / "tables.safetensors").write_bytes(safetensors.numpy.save(contiguous))
    if vocabulary is not None:
        save_vocabulary(vocabulary, folder / VOCABULARY_FILE)
    if parts.text is not None:
        for name in TOKENIZER_FILES:
            if not (folder / "tokenizer" / name).is_file():
                raise WeightsError(str(folder), f"tokenizer/{name} missing")
    config = {
        "format": FORMAT,
        "codec": DIFF_ICMH,
        "network": parts.config.to_dict(),
        "provenance": dict(provenance),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return read_checkpoint(folder)


@contextmanager
def _shapes_of(checkpoint: Checkpoint) -> Iterator[None]:
    """Tell what goes wrong while networks are made as the fault of their shapes."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as exc:
        raise WeightsError(checkpoint.name, f"config.json: no such networks: {exc!r}") from exc


def _stored(value: Tensor, half: bool) -> Tensor:
    value = value.detach().cpu().contiguous()
    return value.half() if half and value.is_floating_point() else value


def _fill(module: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Give a module the weights of its file: every one of them and no other, as float32."""
    file = f"{name}.safetensors"
    try:
        state = safetensors.torch.load_file(checkpoint.files.paths[file])
        state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        module.load_state_dict(state, assign=True)
    except (RuntimeError, safetensors.SafetensorError, OSError) as exc:
        raise WeightsError(checkpoint.name, f"{file}: {exc}") from exc
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise WeightsError(checkpoint.name, f"{file}: {key} is not finite")
    module.eval().requires_grad_(requires_grad=False)
