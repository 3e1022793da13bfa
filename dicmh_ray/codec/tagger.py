"""TaggerHead: words for a picture, from the symbols that its stream is made of.

    finest symbols ──log magnitudes in a pyramid of regions, their covariance──> features ──linear──>
    score of each word ──calibration──> probability ──threshold of the word──> suggested or not

No network runs: the features are sums over the integers that the encoder has anyway, so a picture
that is being encoded, and equally a stream that was written years ago, is tagged for a few
milliseconds. A word whose threshold is missing did not prove itself (see
:mod:`dicmh_ray.codec.tagger_fitting`) and is never suggested.

``tagger.safetensors`` lies beside a checkpoint's files and travels with them, but is no part of the
``codec_id``: it changes no decoded pixel. Needs numpy and safetensors, not torch.

Shape suffixes: i j the grid of y (1/16), C channels, F features, W words.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from dicmh_ray.codec import TagScore
from dicmh_ray.codec.checkpoint import TAGGER_FILE
from dicmh_ray.errors import WeightsError

FORMAT = "dicmh-tagger/1"

GRIDS = (2, 4)
"""The picture is divided into 2x2 and 4x4 regions, whatever its size."""

REGION_CHANNELS = 96
"""Channels whose magnitude is measured in each region: the first, which are the largest."""

COVARIANCE_CHANNELS = 64
"""Channels between whose magnitudes the covariance over the cells is taken."""

MAGNITUDE_FLOOR = 0.05
"""Added to mean magnitudes before the logarithm: a region of zeros stays finite."""

_ROWS = 64
"""Rows of cells that are in memory as floats at a time."""

Symbols = npt.NDArray[np.int16]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """One word of a tagger, how its scores are read, and how it did on photographs not fitted to."""

    word: str

    slope: float
    """Of the logistic curve from score to probability."""

    offset: float
    """Of the same."""

    threshold: float | None
    """Probability from which the word is suggested; None: never."""

    photographs: int
    """Labelled with it."""

    subjects: int
    """Different things those photographs show."""

    chance_ap: float
    """Average precision of guessing."""

    random_ap: float
    """Average precision when other photographs of the same subject were in the fit."""

    subject_ap: float | None
    """Average precision on subjects that were not in the fit; None with fewer than two subjects."""

    precision: float | None = None
    """At the threshold, on subjects that were not in the fit."""

    recall: float | None = None
    """The same."""


class TaggerHead:
    """A linear map from features to words. See the module for what it does.

    Args:
        codec_id: of the checkpoint whose symbols it was fitted to, 64 hex digits.
        words: in the order of the columns of ``weights_FW``.
        mean_F: float32, subtracted from the features.
        scale_F: float32, then multiplied.
        weights_FW: float16.
        provenance: how it was fitted, JSON-able.
    """

    def __init__(
        self,
        *,
        codec_id: str,
        words: Sequence[Word],
        mean_F: Floats,
        scale_F: Floats,
        weights_FW: npt.NDArray[np.float16],
        provenance: dict[str, Any],
    ) -> None:
        self.codec_id = codec_id
        self.words = tuple(words)
        self.provenance = provenance
        self._mean_F, self._scale_F, self._weights_FW = mean_F, scale_F, weights_FW

    def probabilities(self, features_F: Floats) -> list[TagScore]:
        """Every word with its probability, the most probable first.

        Args:
            features_F: of a picture, from :func:`picture_features`.
        """
        x_F = (features_F - self._mean_F) * self._scale_F
        scores_W = x_F @ self._weights_FW.astype(np.float32)
        found = [
            TagScore(word.word, probability(float(score), word.slope, word.offset))
            for word, score in zip(self.words, scores_W, strict=True)
        ]
        return sorted(found, key=lambda tag: (-tag.score, tag.tag))

    def suggest(self, features_F: Floats) -> tuple[TagScore, ...]:
        """The words that reach their threshold, the most probable first."""
        thresholds = {word.word: word.threshold for word in self.words}
        found = []
        for tag in self.probabilities(features_F):
            threshold = thresholds[tag.tag]
            if threshold is not None and tag.score >= threshold:
                found.append(tag)
        return tuple(found)

    def to_bytes(self) -> bytes:
        """The content of ``tagger.safetensors``: the same head gives the same bytes."""
        facts = {
            "format": FORMAT,
            "codec_id": self.codec_id,
            "words": [asdict(word) for word in self.words],
            "provenance": self.provenance,
        }
        tensors: dict[str, npt.NDArray[Any]] = {
            "mean": self._mean_F,
            "scale": self._scale_F,
            "weights": self._weights_FW,
        }
        # One key: safetensors does not keep the order of several.
        return safetensors.numpy.save(tensors, {"tagger": json.dumps(facts, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes, *, codec_id: str, channels: int) -> Self:
        """Read a head, and check that it belongs to a codec.

        Args:
            data: what :meth:`to_bytes` gave.
            codec_id: of the codec that will use it.
            channels: C of that codec's symbols.

        Raises:
            WeightsError: the bytes are damaged, or were fitted to another checkpoint.
        """
        try:
            tensors = safetensors.numpy.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            facts = json.loads(header["__metadata__"]["tagger"])
            found = facts["format"], facts["codec_id"]
            words = tuple(Word(**word) for word in facts["words"])
            provenance = dict(facts["provenance"])
            mean_F, scale_F = tensors["mean"], tensors["scale"]
            weights_FW = tensors["weights"]
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as exc:
            raise WeightsError(TAGGER_FILE, f"it is damaged or no tagger: {exc}") from exc
        if found[0] != FORMAT:
            raise WeightsError(TAGGER_FILE, f"format is {found[0]!r}, wanted {FORMAT!r}")
        if found[1] != codec_id:
            raise WeightsError(
                TAGGER_FILE,
                f"it was fitted to codec {found[1]}, this one is {codec_id}: "
                "fit it again with `dicmh train-tagger`",
            )
        size = num_features(channels)
        shapes = (mean_F.shape, scale_F.shape, weights_FW.shape)
        if shapes != ((size,), (size,), (size, len(words))):
            raise WeightsError(TAGGER_FILE, f"tensors are {shapes}, wanted {size} features")
        if not all(np.isfinite(tensor).all() for tensor in (mean_F, scale_F, weights_FW)):
            raise WeightsError(TAGGER_FILE, "a weight is not finite")
        return cls(
            codec_id=codec_id,
            words=words,
            mean_F=mean_F,
            scale_F=scale_F,
            weights_FW=weights_FW,
            provenance=provenance,
        )


def feature_groups(channels: int) -> tuple[int, ...]:
    """Number of features of each kind: one for each grid, then the covariance."""
    regions = min(channels, REGION_CHANNELS)
    paired = min(channels, COVARIANCE_CHANNELS)
    return (*(grid * grid * regions for grid in GRIDS), paired * (paired + 1) // 2)


def num_features(channels: int) -> int:
    """F for symbols of C channels."""
    return sum(feature_groups(channels))


def picture_features(symbols: Symbols) -> Floats:
    """Features of one picture, float32 ``[F]``, from its finest symbols, int16 ``[i, j, C]``.

    They say how much of each frequency, orientation and colour there is, where, and which of them go
    together; the sign of symbols, that is the phase, plays no part. Regions of a picture with fewer
    cells than regions share cells.
    """
    rows, columns, channels = symbols.shape
    sizes = np.abs(symbols[:, :, :REGION_CHANNELS].astype(np.int32))
    features = []
    for grid in GRIDS:
        for down in _stretches(rows, grid):
            for across in _stretches(columns, grid):
                mean = sizes[down, across].mean((0, 1), dtype=np.float64)
                features.append(np.log(mean + MAGNITUDE_FLOOR))
    paired = min(channels, COVARIANCE_CHANNELS)
    total, products = np.zeros(paired), np.zeros((paired, paired))
    for start in range(0, rows, _ROWS):
        cells = np.log1p(sizes[start : start + _ROWS, :, :paired].astype(np.float64))
        cells = cells.reshape(-1, paired)
        total += cells.sum(0)
        products += cells.T @ cells
    count = rows * columns
    covariance = products / count - np.outer(total / count, total / count)
    upper = covariance[np.triu_indices(paired)]
    features.append(np.sign(upper) * np.sqrt(np.abs(upper)))
    return np.concatenate(features).astype(np.float32)


def probability(score: float, slope: float, offset: float) -> float:
    """The logistic curve."""
    x = max(-60.0, min(60.0, slope * score + offset))
    return 1.0 / (1.0 + math.exp(-x))


def _stretches(cells: int, parts: int) -> list[slice]:
    """Divide an axis; where it has fewer cells than parts, neighbours share one."""
    return [
        slice(part * cells // parts, max(-(-(part + 1) * cells // parts), 1))
        for part in range(parts)
    ]
