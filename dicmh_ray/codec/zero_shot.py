"""ZeroShotTagger: words of any vocabulary, by a CLIP or SigLIP model, through transformers.

    words ──prompts──> texts ──text tower, once──> [W, D] ──cached on disk
    picture ──image tower──> [D] ──cosine, scale (, bias)──> [W] ──softmax or sigmoid──> scores

A score of CLIP is a share: the words of the vocabulary divide 1 among them, so it says which word
fits best, and falls as the vocabulary grows. A score of SigLIP is a probability of each word alone.

Embeddings of words lie under ``$XDG_CACHE_HOME/dicmh_ray/text-embeddings`` (``~/.cache`` where that
is unset), named by a SHA-256 of the model's files, the vocabulary and the prompts: a changed one of
them is another name. A damaged file there is computed again.

Shape suffixes: B pictures, W words, D width of the shared space.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    is_progress_bar_enabled,
)

from dicmh_ray.codec import TagScore
from dicmh_ray.codec.device import find_device
from dicmh_ray.codec.image_taggers import (
    DEFAULT_THRESHOLD,
    DEFAULT_TOP_K,
    best_tags,
    model_directory,
    model_sha256,
)
from dicmh_ray.errors import TaggerError
from dicmh_ray.tags import Vocabulary

_log = logging.getLogger(__name__)

DEFAULT_PROMPTS = {"clip": ("a photo of a {}.",), "siglip": ("this is a photo of {}.",)}
"""Those that the models' authors publish figures with."""

MODEL_TYPES = {"clip": ("clip",), "siglip": ("siglip", "siglip2")}

TEXT_BATCH = 256
IMAGE_BATCH = 32

MAX_ASPECT = 8
"""CLIP's processors scale the short side and crop the middle: a strip of one pixel would grow to
gigabytes. More of the long side than this many short ones is cut before."""

_LOAD_ERRORS = (
    OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError,
    SafetensorError,
)  # fmt: skip
"""What transformers raises for a directory that is no model, or a damaged one."""


class ZeroShotTagger:
    """An :class:`~dicmh_ray.codec.ImageTagger` over any vocabulary.

    Args:
        model: directory in transformers' layout with safetensors, or a hub id that was downloaded.
        vocabulary: what to look for.
        kind: how scores are made; the model must be of it. None takes it from the model.
        prompts: sentences with ``{}`` for the word; their embeddings are averaged. Empty: the kind's.
        threshold: score from which a word is a tag.
        top_k: tags of a picture at most.
        device: a torch device, or ``auto`` for CUDA where there is one.
        cache: folder of embeddings; None is the user's.

    Raises:
        TaggerError: the model is missing, damaged, incomplete or of another kind.
    """

    def __init__(
        self,
        model: str | Path,
        vocabulary: Vocabulary,
        *,
        kind: Literal["clip", "siglip"] | None = None,
        prompts: Sequence[str] = (),
        threshold: float = DEFAULT_THRESHOLD,
        top_k: int = DEFAULT_TOP_K,
        device: str = "auto",
        cache: Path | None = None,
    ) -> None:
        self._name = str(model)
        directory = model_directory(str(model))
        self.model_sha256 = model_sha256(directory)
        self.kind = self._kind(directory, kind)
        self.vocabulary = vocabulary
        self._threshold, self._top_k = threshold, top_k
        self._device = find_device(device)
        self._model, self._processor = self._load(directory)
        self._text_WD = self._text_embeddings(
            tuple(prompts) or DEFAULT_PROMPTS[self.kind], cache or cache_folder()
        ).to(self._device)

    def tag(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[tuple[TagScore, ...]]:
        """See :class:`~dicmh_ray.codec.ImageTagger`."""
        words = self.vocabulary.words
        tags = []
        for scores_W in self.scores(images):
            likely = np.flatnonzero(scores_W >= self._threshold)
            found = [TagScore(words[i], float(scores_W[i])) for i in likely]
            tags.append(best_tags(found, self._threshold, self._top_k))
        return tags

    def scores(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Score of every word, float32 ``[B, W]`` in 0..1, in the order of the vocabulary.

        Args:
            images: each uint8 ``[H, W, 3]``, of any sizes.
        """
        batches = [self._batch_scores(batch) for batch in _batches(images, IMAGE_BATCH)]
        if not batches:
            return np.zeros((0, len(self.vocabulary.words)), np.float32)
        return np.concatenate(batches)

    @torch.no_grad()
    def _batch_scores(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        pictures = [Image.fromarray(_without_ends(image)) for image in images]
        inputs = self._processor.image_processor(images=pictures, return_tensors="pt")
        features = self._model.get_image_features(**inputs.to(self._device))
        image_BD = _unit(_pooled(features))
        logits_BW = image_BD @ self._text_WD.T * self._model.logit_scale.exp()
        if self.kind == "clip":
            scores_BW = logits_BW.softmax(1)
        else:
            scores_BW = (logits_BW + self._model.logit_bias).sigmoid()
        return scores_BW.float().cpu().numpy()

    def _text_embeddings(self, prompts: tuple[str, ...], cache: Path) -> Tensor:
        """Unit vectors ``[W, D]`` of the words, from the cache or computed and put there."""
        key = {
            "format": "dicmh-text-embeddings/1",
            "model": self.model_sha256,
            "vocabulary": self.vocabulary.digest,
            "prompts": prompts,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path = cache / f"{digest}.npy"
        found = _read_embeddings(path, len(self.vocabulary.words))
        if found is None:
            found = self._embed_words(prompts)
            _write_embeddings(path, found)
        return torch.from_numpy(found)

    @torch.no_grad()
    def _embed_words(self, prompts: tuple[str, ...]) -> npt.NDArray[np.float32]:
        parts = []
        # SigLIP was trained on texts of full length; CLIP reads at the end token wherever it is.
        padding = "max_length" if self.kind == "siglip" else "longest"
        length = self._model.config.text_config.max_position_embeddings
        for words in _batches(self.vocabulary.words, TEXT_BATCH):
            total_BD: Any = 0.0
            for prompt in prompts:
                texts = [prompt.replace("{}", word).lower() for word in words]
                inputs = self._processor.tokenizer(
                    texts, padding=padding, truncation=True, max_length=length, return_tensors="pt"
                ).to(self._device)
                inputs.pop("token_type_ids", None)
                total_BD = total_BD + _unit(_pooled(self._model.get_text_features(**inputs)))
            parts.append(_unit(total_BD).float().cpu().numpy())
        return np.concatenate(parts)

    def _kind(
        self, directory: Path, wanted: Literal["clip", "siglip"] | None
    ) -> Literal["clip", "siglip"]:
        try:
            found = AutoConfig.from_pretrained(directory, local_files_only=True).model_type
        except _LOAD_ERRORS as exc:
            raise TaggerError(self._name, f"config.json is no model's: {exc}") from exc
        for kind in ("clip", "siglip") if wanted is None else (wanted,):
            if found in MODEL_TYPES[kind]:
                return kind
        reason = f"its model type is {found!r}, wanted {wanted or 'clip or siglip'}"
        raise TaggerError(self._name, reason)

    def _load(self, directory: Path) -> tuple[Any, Any]:
        """Model and processor. Weights that are missing would be random: they are an error."""
        bar_was_on = is_progress_bar_enabled()
        # A worker's bar is seen by nobody, and one here breaks the job's display.
        disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model, report = AutoModel.from_pretrained(
                directory,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            processor = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]
                directory, local_files_only=True
            )
        except _LOAD_ERRORS as exc:
            raise TaggerError(self._name, f"cannot be loaded: {exc}") from exc
        finally:
            if bar_was_on:
                enable_progress_bar()  # type: ignore[no-untyped-call]
        if missing := sorted(map(str, report["missing_keys"])):
            raise TaggerError(self._name, f"{len(missing)} weights are missing: {missing[0]}")
        for part in ("image_processor", "tokenizer"):
            if getattr(processor, part, None) is None:
                raise TaggerError(self._name, f"its processor has no {part}")
        return model.eval().to(self._device), processor


def cache_folder() -> Path:
    """Where the embeddings of words are kept for this user."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "dicmh_ray" / "text-embeddings"


def _read_embeddings(path: Path, num_words: int) -> npt.NDArray[np.float32] | None:
    """What was cached; None where there is nothing that can be used."""
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as exc:
        _log.warning("%s is computed again: %s", path, exc)
        return None
    is_sound = (
        found.dtype == np.float32
        and found.ndim == 2
        and len(found) == num_words
        and np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-3)  # false for NaN, too
    )
    if not is_sound:
        _log.warning("%s is computed again: not %d unit vectors", path, num_words)
    return found if is_sound else None


def _write_embeddings(path: Path, embeddings_WD: npt.NDArray[np.float32]) -> None:
    """Put them there whole or not at all. A cache that cannot be written costs time, nothing else."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                np.save(file, embeddings_WD)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as exc:
        _log.warning("embeddings are not cached: %s", exc)


def _pooled(output: Any) -> Tensor:
    """Features ``[B, D]``; releases of transformers differ in what they wrap them in."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _unit(x_BD: Tensor) -> Tensor:
    return x_BD / x_BD.norm(dim=1, keepdim=True)


def _without_ends(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """The middle of a very long picture; any other as it is."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is {image.dtype} {image.shape}, wanted uint8 [H, W, 3]")
    limit = MAX_ASPECT * min(image.shape[:2])
    top, left = (max(side - limit, 0) // 2 for side in image.shape[:2])
    return np.ascontiguousarray(image[top : top + limit, left : left + limit])


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
