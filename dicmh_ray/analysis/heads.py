"""Fit a head to the latents of an archive, and say how well it does on pictures left out.

Labels are in the archive: the main tag, or a field of the metadata. The share of pictures that is left
out is chosen by a hash of the key: the same in every run, and whatever the archive grows by.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dicmh_ray.errors import MissingExtraError, TaskError
from dicmh_ray.views import Archive, ImageView

if TYPE_CHECKING:
    from dicmh_ray.codec.latent_head import LatentHead

TAG = "tag"
"""As a label: the main tag."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadReport:
    """A fit, and how well it does."""

    label: str
    states: int | None
    classes: tuple[str, ...]
    fitted_to: int
    """Pictures."""

    left_out: int
    """Pictures that the accuracy is of; the head never saw them."""

    accuracy: float | None
    """Share of them whose class is right; None without any."""

    chance: float | None
    """The same of always saying the most frequent class."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def fit_head(
    archive: Archive,
    *,
    label: str = TAG,
    states: int | None = None,
    where: str | None = None,
    left_out: float = 0.2,
    min_images: int = 4,
    epochs: int = 60,
    width: int = 64,
    seed: int = 0,
) -> tuple["LatentHead", HeadReport]:
    """Fit a head to an archive's latents. They are all held in memory.

    Args:
        archive: whose rows are labelled.
        label: ``"tag"`` for the main tag, or ``"metadata.FIELD"``.
        states: of the latents; None is all.
        where: filter of the rows.
        left_out: share of the pictures that the head is tested on and not fitted to.
        min_images: classes with fewer are left alone.
        epochs: passes over the pictures.
        width: channels inside the head.
        seed: of the fit.

    Raises:
        TaskError: there are fewer than two classes.
        MissingExtraError: torch is not installed.
        ValueError: an argument is out of range.
    """
    if label != TAG and not label.startswith("metadata."):
        raise ValueError(f"label is {label!r}, wanted 'tag' or 'metadata.FIELD'")
    if not 0 <= left_out < 1:
        raise ValueError(f"left_out is {left_out}, wanted 0 to below 1")
    try:
        from dicmh_ray.codec.latent_head import HeadOptions, LatentHead
    except ModuleNotFoundError as exc:
        if exc.name not in ("torch", "safetensors"):
            raise
        raise MissingExtraError(exc.name, "codec") from exc
    keys, values, latents = [], [], []
    for image in archive.iter(where, view="latent", states=states, on_error="skip"):
        value = label_of(image, label)
        if value is not None:
            keys.append(image.key)
            values.append(value)
            latents.append(image.latent(states))
    counts = Counter(values)
    classes = sorted(value for value, count in counts.items() if count >= min_images)
    if len(classes) < 2:
        raise TaskError(
            "fit-head",
            f"of {len(keys)} pictures with a {label} there are {len(classes)} classes of "
            f"{min_images} or more, wanted two",
        )
    known = [i for i, value in enumerate(values) if value in set(classes)]
    test = {i for i in known if _is_left_out(keys[i], left_out)}
    train = [i for i in known if i not in test]
    head = LatentHead.fit(
        [latents[i] for i in train],
        [classes.index(values[i]) for i in train],
        labels=classes,
        codec_id=archive.codec_id,
        states=states,
        options=HeadOptions(epochs=epochs, width=width, seed=seed),
    )
    report = _report(head, latents, values, sorted(test), label, len(train))
    head.provenance = report.to_dict()
    return head, report


def label_of(image: ImageView, label: str) -> str | None:
    """The label of a picture as text; None if it has none."""
    if label == TAG:
        return image.tags[0] if image.tags else None
    value: Any = image.metadata
    for part in label.removeprefix("metadata.").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if value is None or isinstance(value, str) else json.dumps(value, sort_keys=True)


def _is_left_out(key: str, share: float) -> bool:
    digest = hashlib.sha256(f"head {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _report(
    head: "LatentHead",
    latents: Sequence[Any],
    values: Sequence[str],
    test: Sequence[int],
    label: str,
    fitted_to: int,
) -> HeadReport:
    accuracy = chance = None
    if test:
        odds = head.probabilities([latents[i] for i in test])
        found = [head.labels[one] for one in odds.argmax(axis=1)]
        truth = [values[i] for i in test]
        accuracy = sum(a == b for a, b in zip(found, truth, strict=True)) / len(test)
        chance = Counter(truth).most_common(1)[0][1] / len(test)
    return HeadReport(
        label=label,
        states=head.states,
        classes=head.labels,
        fitted_to=fitted_to,
        left_out=len(test),
        accuracy=accuracy,
        chance=chance,
    )
