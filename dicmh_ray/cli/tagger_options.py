"""The options that describe a tagger, the same for ``tag`` and ``compress``."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from dicmh_ray.cli.output import usage_checked
from dicmh_ray.codec.checkpoint import checkpoint_directory
from dicmh_ray.codec.image_taggers import DEFAULT_TOP_K, TaggerSpec
from dicmh_ray.codec.vocabularies import VOCABULARY_FILE, load_vocabulary
from dicmh_ray.tags import MAX_VOCABULARY_WORDS

HEAD = "head"
"""The tagger that is part of a checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggerArguments:
    """The command line, not yet checked."""

    tagger: str
    vocabulary: Path | None
    threshold: float | None
    top_k: int | None
    prompts: Sequence[str]

    def spec(self, checkpoint: str, *, every: bool = False) -> TaggerSpec | None:
        """What they describe; None for the checkpoint's own head.

        Args:
            checkpoint: whose ``vocabulary.txt`` a zero-shot model takes when none is named.
            every: no threshold and no limit.

        Raises:
            typer.BadParameter: the options make no sense together.
            VocabularyError: the vocabulary cannot be read.
        """
        if self.tagger == HEAD:
            if self.vocabulary is not None or self.prompts:
                raise typer.BadParameter("--vocabulary and --prompt are for clip: and siglip:")
            return None
        words: tuple[str, ...] = ()
        if self.vocabulary is not None:
            words = load_vocabulary(self.vocabulary).words
        elif self.tagger.startswith(("clip:", "siglip:")):
            own = checkpoint_directory(checkpoint) / VOCABULARY_FILE
            if not own.is_file():
                raise typer.BadParameter("name the words to look for with --vocabulary FILE")
            words = load_vocabulary(own).words
        with usage_checked():
            spec = TaggerSpec.parse(
                self.tagger,
                vocabulary=words,
                threshold=0.0 if every else self.threshold,
                top_k=MAX_VOCABULARY_WORDS if every else self.top_k or DEFAULT_TOP_K,
                prompts=tuple(self.prompts),
            )
        if spec.kind == "callable" and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # as `python -m` would; Ray hands it to its workers
        return spec
