"""The recipe of a tagger: labelled photographs in, ``tagger.safetensors`` and its figures out.

    sources ──analyse──> features ─┐
    labels.csv ──words, subjects───┴─fit──> TaggerHead ──> file · table for docs/tagger.md

A label names either one subject (``bear_plushie``: all its photographs show the same bear) or a
kind (``hoodie``: each photograph shows another one). Figures that mean something for a picture not
seen before leave whole subjects out, so the difference is told here, label by label.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from dicmh_ray.codec import read_checkpoint
from dicmh_ray.codec.layered_codec import load_layered_codec
from dicmh_ray.codec.tagger import TaggerHead, Word
from dicmh_ray.codec.tagger_fitting import (
    MIN_PRECISION,
    MIN_SUGGESTED,
    RANDOM_FOLDS,
    RIDGE,
    LabelledPhotograph,
    fit_tagger,
)
from dicmh_ray.errors import SourceFormatError, SourceImageError
from dicmh_ray.recipe import CLASS_OF_SUBJECT, kind_of_label, label_rows
from dicmh_ray.source import SourceOptions, load_pixels, plan_units, read_unit

ONE_SUBJECT = frozenset(
    {
        "backpack",
        "can",
        "candle",
        "cat",
        "cat2",
        "clock",
        "dog",
        "dog2",
        "dog3",
        "dog5",
        "dog6",
        "dog7",
        "dog8",
        "teapot",
        "vase",
        *CLASS_OF_SUBJECT,
    }
)
"""Labels whose photographs all show one subject. Any other label is a kind."""

WIDER_WORDS: Mapping[str, str] = {"boot": "shoes", "sneaker": "shoes"}
"""Words that hold as well: a sneaker must not teach that it is no shoe."""

MIN_USEFUL_RECALL = 0.25
"""A tagger whose suggestions find less than this share of what its words name is not useful."""

Pixels = npt.NDArray[np.uint8]

_REPORT = """\
# The tagger

Written by `dicmh train-tagger`; how it works: `dicmh_ray/codec/tagger.py`. No evaluation picture was used.

Checkpoint `{codec_id}`; {labelled} labelled photographs of {collections}; least squares with ridge {ridge}.

| mean average precision | words | guessing | random folds | new subjects |
|---|---|---|---|---|
{several}
{every}

*Random folds* ({folds}) leave photographs out and keep others of the same subject in the fit. *New subjects* leaves
whole subjects out: it is the figure for pictures of other things. Average precision of a word is taken among
the photographs of the collections that have it, so that telling collections apart earns nothing; guessing
gives the share of positives there.

A word is suggested from the threshold where, on new subjects and over all labelled photographs, at least
{precision} of at least {count} suggestions were right. A word that cannot reach that, or whose photographs show
a single subject, is never suggested. Thresholds are chosen on the same left-out scores that precision and recall
are given for, and over many words, which flatters both: with few suggestions, which words pass depends on how
the folds were dealt. Features and ridge were chosen by the mean on new subjects of these photographs, which
flatters that mean. All of it holds for pictures like these, with one thing in the middle.

"""

_UNLABELLED = (
    "For {count} other photographs, without labels, it suggests {rate}. They were not used as "
    "negatives: nobody has said what is on them, and people on them wear clothes."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggerRun:
    """A fitted head and what it was measured on."""

    head: TaggerHead

    labelled: int

    unlabelled: int

    suggested_on_unlabelled: int
    """Tags suggested for all the photographs without a label: nobody says that they are wrong."""


def words_of_label(label: str) -> tuple[str, ...]:
    """Tags of a label, the narrowest first: lower case, numbers at the end of subjects dropped."""
    word = kind_of_label(label)
    return (word, WIDER_WORDS[word]) if word in WIDER_WORDS else (word,)


def read_labelled(paths: Sequence[Path]) -> dict[str, LabelledPhotograph]:
    """Labels by file name, from CSV files with columns ``file`` and ``label``; each is a collection.

    Raises:
        SourceFormatError: a file has no such columns, a label cannot be a tag, or a photograph has
            two labels.
    """
    found: dict[str, LabelledPhotograph] = {}
    for path in paths:
        for name, label in label_rows(path):
            if name in found:
                raise SourceFormatError(str(path), f"{name} has a label already")
            found[name] = LabelledPhotograph(
                name=name,
                words=words_of_label(label),
                subject=label if label in ONE_SUBJECT else name,
                collection=path.parent.name or path.stem,
            )
    return found


def train_tagger(
    sources: Sequence[str],
    labels: Sequence[Path],
    *,
    checkpoint: str | Path = "default",
    device: str = "auto",
    progress: Callable[[str, int, int], None] | None = None,
) -> TaggerRun:
    """Fit a tagger for a checkpoint.

    Args:
        sources: photographs, as for compression. A label belongs to the file of its name.
        labels: CSV files.
        checkpoint: whose features are used; the head fits no other.
        device: a torch device, or ``"auto"``.
        progress: called with what is being done, how much of it is, and how much there is.

    Raises:
        SourceError: a source or a label file cannot be read, or a label has no photograph.
        WeightsError: the checkpoint is missing or damaged.
    """
    labelled = read_labelled(labels)
    names = ", ".join(map(str, labels))
    codec = load_layered_codec(read_checkpoint(checkpoint), device=device)
    features: dict[str, npt.NDArray[np.float32]] = {}
    others: list[npt.NDArray[np.float32]] = []
    for name, image in _photographs(sources, progress):
        if name in features:
            raise SourceFormatError(name, "two photographs have this name")
        if name in labelled:
            features[name] = codec.tag_features(image)
        else:
            others.append(codec.tag_features(image))
    missing = sorted(set(labelled) - set(features))
    if missing:
        reason = f"{len(missing)} photographs are not in the sources or unreadable: {missing[0]}"
        raise SourceFormatError(names, reason)
    photographs = [labelled[name] for name in sorted(features)]
    if len({word for photograph in photographs for word in photograph.words}) < 2:
        raise SourceFormatError(names, "wanted photographs of two words or more")
    head = fit_tagger(
        np.stack([features[photograph.name] for photograph in photographs]),
        photographs,
        codec_id=codec.codec_id,
        channels=codec.latent_channels,
        provenance={
            "photographs": len(photographs),
            "collections": sorted({photograph.collection for photograph in photographs}),
        },
        progress=None if progress is None else lambda done, total: progress("folds", done, total),
    )
    return TaggerRun(
        head=head,
        labelled=len(photographs),
        unlabelled=len(others),
        suggested_on_unlabelled=sum(len(head.suggest(found)) for found in others),
    )


def report_lines(run: TaggerRun) -> list[str]:
    """The figures as Markdown: a summary, a table of the words, a verdict."""
    words = run.head.words
    several = [word for word in words if word.subject_ap is not None]
    row = "| {} | {} | {} | {} | {} |".format
    heads = ("guessing", "AP, random folds", "AP, new subjects", "threshold", "precision", "recall")
    text = _REPORT.format(
        codec_id=run.head.codec_id,
        labelled=run.labelled,
        collections=", ".join(run.head.provenance["collections"]),
        ridge=f"{RIDGE:g}",
        several=row(
            "words with several subjects",
            len(several),
            _mean([word.chance_ap for word in several]),
            _mean([word.random_ap for word in several]),
            _mean([word.subject_ap for word in several if word.subject_ap is not None]),
        ),
        every=row(
            "all words",
            len(words),
            _mean([word.chance_ap for word in words]),
            _mean([word.random_ap for word in words]),
            "-",
        ),
        folds=RANDOM_FOLDS,
        precision=f"{MIN_PRECISION:.0%}",
        count=MIN_SUGGESTED,
    )
    lines = text.splitlines()
    lines.append(f"| word | photographs | subjects | {' | '.join(heads)} |")
    lines.append("|---" * (3 + len(heads)) + "|")
    lines.extend(
        _word_line(word) for word in sorted(words, key=lambda w: (-(w.subject_ap or 0), w.word))
    )
    lines += ["", f"**{verdict(words)}**"]
    if run.unlabelled:
        mean = run.suggested_on_unlabelled / run.unlabelled
        rate = f"{mean:.2f} tags a photograph ({run.suggested_on_unlabelled} in all)"
        lines += ["", _UNLABELLED.format(count=run.unlabelled, rate=rate)]
    return lines


def verdict(words: Sequence[Word]) -> str:
    """Whether suggestions are worth having, with the figure that says so."""
    several = [word for word in words if word.subject_ap is not None]
    kept = sum(word.recall is not None for word in several)
    found = sum((word.recall or 0.0) * word.photographs for word in several)
    recall = found / max(sum(word.photographs for word in several), 1)
    judgement = "Useful" if recall >= MIN_USEFUL_RECALL else "Not useful: leave it off"
    return (
        f"{judgement}. {kept} of {len(words)} words are ever suggested, and they find {recall:.1%} "
        "of what the words with several subjects name."
    )


def _photographs(
    sources: Sequence[str], progress: Callable[[str, int, int], None] | None
) -> Iterator[tuple[str, Pixels]]:
    """File name and pixels of every picture that can be read."""
    options = SourceOptions()
    units = plan_units(sources, options=options)
    total, done = sum(unit.num_bytes for unit in units), 0
    for unit in units:
        for image in read_unit(unit, options=options):
            try:
                yield PurePosixPath(image.source_uri).name, load_pixels(image.data).image
            except SourceImageError:
                continue
            finally:
                done += len(image.data)
                if progress is not None:
                    progress("features", done, total)


def _word_line(word: Word) -> str:
    figures = (
        word.chance_ap, word.random_ap, word.subject_ap, word.threshold, word.precision, word.recall
    )  # fmt: skip
    cells = ["-" if value is None else f"{value:.2f}" for value in figures]
    return f"| {word.word} | {word.photographs} | {word.subjects} | {' | '.join(cells)} |"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.3f}" if values else "-"
