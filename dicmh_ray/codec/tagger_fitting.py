"""Labelled features -> TaggerHead, and the honest figures that go with it.

The head is regularised least squares in closed form: with a few hundred photographs and thousands
of features it needs no schedule and no seed. Everything that is reported or decided (average
precision, calibration, thresholds) comes from scores of photographs that were left out of the fit,
in two ways of leaving out:

* random folds: other photographs of the same thing are in the fit, which flatters;
* one subject at a time: the figure for things the head has never seen. Thresholds come from these.

Shape suffixes: N photographs, F features, W words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dicmh_ray.codec.tagger import Floats, TaggerHead, Word, feature_groups, probability

RIDGE = 0.01
"""Penalty, where the mean photograph's features have a squared length of 1. Chosen from 0.003 to 1 by
subject folds: between 0.003 and 0.03 little changes."""

RANDOM_FOLDS = 10

MIN_PRECISION = 0.8
"""A word is suggested where, among photographs left out of the fit, at least this share was right."""

MIN_SUGGESTED = 5
"""A threshold that fewer photographs reach has proved nothing."""

Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledPhotograph:
    """What a photograph shows."""

    name: str

    words: tuple[str, ...]

    subject: str
    """Photographs of one thing share it, and are never on both sides of a subject fold."""

    collection: str
    """Its words are right for every photograph of the collection: a photograph without the word is
    a negative. Average precision of a word is taken within the collections that have it, so that
    telling two collections apart earns nothing."""


class FittedLinear(NamedTuple):
    """``(features - mean) * scale @ weights``"""

    mean_F: Doubles
    scale_F: Doubles
    weights_FW: Doubles

    def scores(self, features_NF: Floats) -> Doubles:
        """Float64 ``[N, W]``."""
        return ((features_NF - self.mean_F) * self.scale_F) @ self.weights_FW


def fit_tagger(
    features_NF: Floats,
    photographs: Sequence[LabelledPhotograph],
    *,
    codec_id: str,
    channels: int,
    provenance: dict[str, Any],
    progress: Callable[[int, int], None] | None = None,
) -> TaggerHead:
    """Fit a head to all photographs, and judge each word on folds.

    Args:
        features_NF: from :func:`~dicmh_ray.codec.tagger.picture_features`, one row a photograph.
        photographs: their labels, in the same order.
        codec_id: of the checkpoint that made the features.
        channels: C of its symbols.
        provenance: goes into the file.
        progress: called with folds done and folds in all.

    Raises:
        ValueError: there are not two photographs and two words.
    """
    words = sorted({word for photograph in photographs for word in photograph.words})
    if len(photographs) < 2 or len(words) < 2:
        raise ValueError(f"{len(photographs)} photographs, {len(words)} words: wanted two of each")
    labels_NW = np.array([[word in p.words for word in words] for p in photographs])
    by_random, by_subject = random_folds(photographs), subject_folds(photographs)
    total = len(set(by_random)) + len(set(by_subject))
    done = 0

    def held_out(folds: Sequence[int]) -> Doubles:
        """Scores of every photograph by heads that were fitted without its fold."""
        nonlocal done
        scores_NW = np.zeros(labels_NW.shape)
        numbers = np.array(folds)
        for fold in sorted(set(folds)):
            inside = numbers == fold
            head = fit_linear(features_NF[~inside], labels_NW[~inside], channels)
            scores_NW[inside] = head.scores(features_NF[inside])
            done += 1
            if progress is not None:
                progress(done, total)
        return scores_NW

    random_NW, subject_NW = held_out(by_random), held_out(by_subject)
    judged = [
        judge_word(
            word, labels_NW[:, w], random_N=random_NW[:, w], subject_N=subject_NW[:, w],
            photographs=photographs,
        )
        for w, word in enumerate(words)
    ]  # fmt: skip
    head = fit_linear(features_NF, labels_NW, channels)
    # float16 keeps three digits of the largest weight of each word; the slope takes the unit.
    unit_W = np.maximum(np.abs(head.weights_FW).max(0), 1e-12)
    return TaggerHead(
        codec_id=codec_id,
        words=[
            Word(**{**facts, "slope": facts["slope"] * float(unit)})
            for facts, unit in zip(judged, unit_W, strict=True)
        ],
        mean_F=head.mean_F.astype(np.float32),
        scale_F=head.scale_F.astype(np.float32),
        weights_FW=(head.weights_FW / unit_W).astype(np.float16),
        provenance=provenance,
    )


def fit_linear(features_NF: Floats, labels_NW: Flags, channels: int) -> FittedLinear:
    """Least squares to 0 and 1 with a ridge, in the dual: a matrix of N by N is solved.

    Each group of features counts alike. The intercept is left out: how common a word is among the
    photographs of a fold must not move the scores of those outside it.
    """
    features = features_NF.astype(np.float64)
    mean_F = features.mean(0)
    deviation_F = features.std(0)
    sizes = np.array(feature_groups(channels))
    group_F = np.repeat(sizes * len(sizes), sizes)
    varies_F = deviation_F > 1e-6
    scale_F = np.where(varies_F, 1 / (np.where(varies_F, deviation_F, 1) * np.sqrt(group_F)), 0.0)
    x_NF = (features - mean_F) * scale_F
    kernel_NN = x_NF @ x_NF.T + RIDGE * np.eye(len(x_NF))
    targets_NW = labels_NW - labels_NW.mean(0)
    return FittedLinear(mean_F, scale_F, x_NF.T @ np.linalg.solve(kernel_NN, targets_NW))


def judge_word(
    word: str,
    label_N: Flags,
    *,
    random_N: Doubles,
    subject_N: Doubles,
    photographs: Sequence[LabelledPhotograph],
) -> dict[str, Any]:
    """The fields of a :class:`Word`, from scores of photographs outside the fit.

    With a single subject nothing says how the word does on another one: it gets no threshold.
    """
    collections = {p.collection for p, has in zip(photographs, label_N, strict=True) if has}
    own_N = np.array([p.collection in collections for p in photographs])
    subjects = {p.subject for p, has in zip(photographs, label_N, strict=True) if has}
    has_subjects = len(subjects) > 1
    judged_N = subject_N if has_subjects else random_N
    slope, offset = fit_calibration(judged_N, label_N)
    chosen = None
    if has_subjects and slope > 0:
        values = [probability(float(score), slope, offset) for score in judged_N]
        chosen = choose_threshold(np.array(values), label_N)
    return {
        "word": word,
        "slope": slope,
        "offset": offset,
        "threshold": chosen.threshold if chosen else None,
        "photographs": int(label_N.sum()),
        "subjects": len(subjects),
        "chance_ap": float(label_N[own_N].mean()),
        "random_ap": average_precision(random_N[own_N], label_N[own_N]),
        "subject_ap": average_precision(subject_N[own_N], label_N[own_N]) if has_subjects else None,
        "precision": chosen.precision if chosen else None,
        "recall": chosen.recall if chosen else None,
    }


def average_precision(scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean over the positives of the precision down to each, ranked by score.

    Equal scores share the precision at the end of their run, so that the order of photographs does
    not matter. Guessing gives about the share of positives.

    Raises:
        ValueError: nothing is positive.
    """
    values, flags = np.asarray(scores, np.float64), np.asarray(labels, bool)
    if not flags.any():
        raise ValueError("average precision needs a positive")
    order = np.argsort(-values, kind="stable")
    values, hits = values[order], np.cumsum(flags[order])
    ends = np.append(np.flatnonzero(np.diff(values)), len(values) - 1)
    found = np.diff(hits[ends], prepend=0)
    return float((found * hits[ends] / (ends + 1)).sum() / hits[-1])


class Threshold(NamedTuple):
    """A threshold and how it does."""

    threshold: float
    precision: float
    recall: float


def choose_threshold(probabilities: Doubles, labels: Flags) -> Threshold | None:
    """The threshold with the highest recall at :data:`MIN_PRECISION`; None where there is none.

    Among equal recalls the strictest.
    """
    best = None
    for threshold in np.unique(probabilities)[::-1]:
        suggested = probabilities >= threshold
        count, right = int(suggested.sum()), int((suggested & labels).sum())
        recall = right / int(labels.sum())
        is_better = best is None or recall > best.recall
        if is_better and count >= MIN_SUGGESTED and right >= MIN_PRECISION * count:
            best = Threshold(float(threshold), right / count, recall)
    return best


def fit_calibration(scores: Doubles, labels: Flags) -> tuple[float, float]:
    """Slope and offset of the logistic curve through scores (Platt), by Newton's method.

    Targets are drawn in from 0 and 1 as if one more of each had been seen, so that separable
    scores give a finite slope. A slope that is not positive means that the scores say nothing.
    """
    positives = int(labels.sum())
    negatives = len(labels) - positives
    targets = np.where(labels, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    unit = max(float(scores.std()), 1e-9)
    design = np.stack([scores / unit, np.ones_like(scores)], 1)
    share = (positives + 1) / (len(labels) + 2)
    curve = np.array([0.0, np.log(share / (1 - share))])
    for _ in range(100):
        p = 1 / (1 + np.exp(-np.clip(design @ curve, -60, 60)))
        # The ridge keeps the step finite where the curve is flat.
        hessian = (design * (p * (1 - p))[:, None]).T @ design + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, design.T @ (targets - p))
        curve = curve + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return float(curve[0]) / unit, float(curve[1])


def random_folds(photographs: Sequence[LabelledPhotograph]) -> list[int]:
    """Deal the photographs of each label in turn to the folds, in an order fixed by a seed."""
    shuffled = np.random.default_rng(0).permutation(len(photographs)).tolist()
    shuffled.sort(key=lambda n: (photographs[n].collection, photographs[n].words))
    folds = [0] * len(photographs)
    for position, n in enumerate(shuffled):
        folds[n] = position % RANDOM_FOLDS
    return folds


def subject_folds(photographs: Sequence[LabelledPhotograph]) -> list[int]:
    """A fold for each subject with several photographs; the others are dealt to the same folds.

    Each of those is a subject of its own: no fold has two photographs of one thing on both sides.
    There are at least as many folds as random ones.
    """
    members: dict[str, list[int]] = {}
    for n, photograph in enumerate(photographs):
        members.setdefault(photograph.subject, []).append(n)
    several = [subject for subject, found in members.items() if len(found) > 1]
    alone = [found[0] for found in members.values() if len(found) == 1]
    alone.sort(key=lambda n: (photographs[n].collection, photographs[n].words, n))
    folds = [0] * len(photographs)
    for fold, subject in enumerate(several):
        for n in members[subject]:
            folds[n] = fold
    count = max(len(several), RANDOM_FOLDS)
    for position, n in enumerate(alone):
        folds[n] = count - 1 - position % count  # from the end: the first may be full already
    return folds
