"""Taggers of pictures, as a job describes them and as a worker loads them.

    TaggerSpec ──pinned (driver: the model is there, its digest)──> pickled with the job
               ──load_image_tagger (worker, once)──> ImageTagger ──tag(images)──> scored words

Needs no torch; a zero-shot model brings it when it is loaded. A tagger that is part of a codec's
checkpoint (:class:`~dicmh_ray.codec.TagSuggester`) is another thing: it reads streams, not pictures.
"""

import hashlib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from dicmh_ray.codec import ImageTagger, TagScore
from dicmh_ray.errors import MissingExtraError, TaggerError
from dicmh_ray.tags import Vocabulary, encode_tags

DEFAULT_THRESHOLD = 0.1
"""Of zero-shot models. Not tuned to any: try a few pictures with ``dicmh tag --all`` first."""

DEFAULT_TOP_K = 10

MODEL_FILES = (".json", ".model", ".safetensors", ".txt")
"""Endings of the files of a model directory that are read, and that its digest covers."""

_CHUNK_BYTES = 2**24

_MODEL_KINDS: dict[str, Literal["clip", "siglip"]] = {"clip": "clip", "siglip": "siglip"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaggerSpec:
    """What a tagger is, in plain values: it travels to workers and stands in an archive's plan."""

    kind: Literal["clip", "siglip", "callable"]
    """A zero-shot model, or code of the user's."""

    target: str
    """Model directory or hub id (that was downloaded before); or ``package.module:name``."""

    vocabulary: tuple[str, ...] = ()
    """Words a zero-shot model looks for. Empty for user code."""

    threshold: float | None = None
    """Score from which a word is a tag; None: 0.1 for models, 0 for user code."""

    top_k: int = DEFAULT_TOP_K
    """Tags of a picture at most."""

    prompts: tuple[str, ...] = ()
    """Sentences with ``{}`` for the word, whose embeddings are averaged; empty: the kind's own."""

    sha256: str = ""
    """Digest of the model's files, from :meth:`pinned`. One who loads other files is refused."""

    def __post_init__(self) -> None:
        if self.kind not in ("clip", "siglip", "callable"):
            raise ValueError(f"a tagger is clip, siglip or callable, not {self.kind!r}")
        if self.kind == "callable" and (self.vocabulary or self.prompts):
            raise ValueError("a vocabulary and prompts are for clip and siglip")
        if self.kind != "callable" and not self.vocabulary:
            raise ValueError(f"{self.kind} needs a vocabulary: which words to look for")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}, wanted 0..1")
        if self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, wanted at least 1")
        for prompt in self.prompts:
            if prompt.count("{}") != 1 or prompt.count("{") + prompt.count("}") != 2:
                raise ValueError(f"prompt {prompt!r}: wanted one {{}} for the word")

    @classmethod
    def parse(cls, text: str, **options: Any) -> Self:
        """The spec that ``clip:DIR``, ``siglip:DIR`` or ``package.module:name`` stands for.

        Raises:
            ValueError: the text is none of them, or an option does not go with it.
        """
        kind, colon, target = text.partition(":")
        if not colon or not kind or not target:
            raise ValueError(f"tagger {text!r}: wanted clip:DIR, siglip:DIR or package.module:name")
        model = _MODEL_KINDS.get(kind)
        if model is not None:
            return cls(kind=model, target=target, **options)
        return cls(kind="callable", target=text, **options)

    def pinned(self) -> Self:
        """The same with the digest of the model that is here: what a plan and its workers rely on.

        User code is imported to see that it can be; its content is not covered.

        Raises:
            TaggerError: there is no such model or code.
        """
        if self.kind == "callable":
            find_callable(self.target)
            return self
        return replace(self, sha256=model_sha256(model_directory(self.target)))

    def identity(self) -> dict[str, Any]:
        """What the tags of an archive depend on, JSON-able: part of its plan.

        A model counts by its digest, so it may lie elsewhere when the job goes on.
        """
        facts: dict[str, Any] = {
            "kind": self.kind,
            "threshold": self.threshold,
            "top_k": self.top_k,
        }
        if self.kind == "callable":
            return facts | {"target": self.target}
        return facts | {
            "model_sha256": self.sha256,
            "vocabulary_sha256": Vocabulary(self.vocabulary).digest,
            "prompts": list(self.prompts),
        }


def load_image_tagger(spec: TaggerSpec, *, device: str = "auto") -> ImageTagger:
    """Load what a spec describes.

    Args:
        spec: with ``sha256``, the model must have that digest.
        device: a torch device for zero-shot models, or ``auto``.

    Raises:
        TaggerError: it is not there, damaged, another model, or does not do what a tagger does.
        MissingExtraError: torch or transformers is not installed.
    """
    threshold = spec.threshold
    if spec.kind == "callable":
        found = find_callable(spec.target)
        return CallableTagger(found, spec.target, threshold=threshold or 0.0, top_k=spec.top_k)
    try:
        from dicmh_ray.codec.zero_shot import ZeroShotTagger
    except ModuleNotFoundError as exc:
        if exc.name not in ("torch", "transformers"):
            raise
        raise MissingExtraError(exc.name, "codec") from exc
    tagger = ZeroShotTagger(
        spec.target,
        Vocabulary(spec.vocabulary),
        kind=spec.kind,
        prompts=spec.prompts,
        threshold=DEFAULT_THRESHOLD if threshold is None else threshold,
        top_k=spec.top_k,
        device=device,
    )
    if spec.sha256 and tagger.model_sha256 != spec.sha256:
        reason = (
            f"its files have SHA-256 {tagger.model_sha256[:16]}, the job has {spec.sha256[:16]}"
        )
        raise TaggerError(f"{spec.kind}:{spec.target}", reason)
    return tagger


class CallableTagger:
    """User code as an :class:`~dicmh_ray.codec.ImageTagger`: checks and orders what it gives.

    Args:
        code: an object with a ``tag`` method, a class of such objects (made without arguments), or
            a function. Method and function take a list of pictures, uint8 ``[H, W, 3]``, read-only,
            and return for each an iterable of words, or of pairs of word and score 0..1. A word
            without a score has 1.0.
        name: for messages.
        threshold: score from which a word is a tag.
        top_k: tags of a picture at most.

    Raises:
        TaggerError: ``code`` is neither, or the class cannot be instantiated.
    """

    def __init__(
        self, code: Any, name: str, *, threshold: float = 0.0, top_k: int = DEFAULT_TOP_K
    ) -> None:
        if isinstance(code, type):
            try:
                code = code()
            except Exception as exc:  # the user's code: anything may come out of it
                raise TaggerError(name, f"cannot be made: {type(exc).__name__}: {exc}") from exc
        self._call = getattr(code, "tag", code)
        if not callable(self._call):
            raise TaggerError(
                name, f"a {type(code).__name__} is no function and has no `tag` method"
            )
        self._name, self._threshold, self._top_k = name, threshold, top_k

    def tag(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[tuple[TagScore, ...]]:
        """See :class:`~dicmh_ray.codec.ImageTagger`. What the code raises passes.

        Raises:
            TaggerError: the result has another form, or another length than ``images``.
            ValueError: a word cannot be a tag, or a score is outside 0..1.
        """
        results = self._call([_read_only(image) for image in images])
        try:
            results = list(results)
        except TypeError as exc:
            reason = f"gave a {type(results).__name__}, wanted tags for each picture"
            raise TaggerError(self._name, reason) from exc
        if len(results) != len(images):
            raise TaggerError(self._name, f"gave {len(results)} results for {len(images)} pictures")
        return [best_tags(self._scored(tags), self._threshold, self._top_k) for tags in results]

    def _scored(self, tags: Any) -> list[TagScore]:
        if isinstance(tags, str) or not isinstance(tags, Iterable):
            reason = f"gave {tags!r:.60} for a picture, wanted words or pairs of word and score"
            raise TaggerError(self._name, reason)
        scored: dict[str, float] = {}
        for entry in tags:
            match entry:
                case str() as word:
                    score = 1.0
                case (str() as word, (int() | float() | np.floating()) as number):
                    score = float(number)
                case _:
                    reason = f"gave {entry!r:.60}, wanted a word or a pair of word and score"
                    raise TaggerError(self._name, reason)
            if not 0 <= score <= 1:
                raise ValueError(f"the score of {word!r} is {score}, wanted 0..1")
            encode_tags([word])  # raises ValueError for what no stream can carry
            scored[word] = max(score, scored.get(word, 0.0))
        return [TagScore(word, score) for word, score in scored.items()]


def best_tags(scored: Iterable[TagScore], threshold: float, top_k: int) -> tuple[TagScore, ...]:
    """Those that reach the threshold, the best first, at most ``top_k``; equal ones by word."""
    kept = [tag for tag in scored if tag.score >= threshold]
    return tuple(sorted(kept, key=lambda tag: (-tag.score, tag.tag))[:top_k])


def without_known(own_tags: Sequence[str], suggestions: Sequence[TagScore]) -> tuple[TagScore, ...]:
    """The suggestions that a picture's own tags do not hold yet, in any case of letters.

    None of them where a stream has no room for both: own tags come first.
    """
    known = {tag.casefold() for tag in own_tags}
    added = tuple(tag for tag in suggestions if tag.tag.casefold() not in known)
    try:
        encode_tags([*own_tags, *(tag.tag for tag in added)])
    except ValueError:
        return ()
    return added


def find_callable(path: str) -> Any:
    """What ``package.module:name`` names. The module is imported: it is the user's own code.

    Raises:
        TaggerError: there is no such module or name, or the module fails.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), name)):
        raise TaggerError(path, "wanted package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as exc:
        missing = exc.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            reason = f"there is no module {missing} on Python's path"
        else:
            reason = f"{module_name} imports {missing}, which is not installed"
        raise TaggerError(path, reason) from exc
    except Exception as exc:  # the user's code: anything may come out of it
        raise TaggerError(path, f"{module_name} fails: {type(exc).__name__}: {exc}") from exc
    try:
        return getattr(module, name)
    except AttributeError as exc:
        raise TaggerError(path, f"{module_name} has no {name}") from exc


def model_directory(target: str) -> Path:
    """The directory of a model: the path itself, or where the hub's client keeps that model.

    Nothing is downloaded: a job should not fetch gigabytes on each of its workers unasked.

    Raises:
        TaggerError: it is neither.
        MissingExtraError: a hub id was given and transformers is not installed.
    """
    path = Path(target)
    if path.is_dir():
        return path
    hint = (
        f"no such directory, and not downloaded; if it is a model of the hub: hf download {target}"
    )
    if target.count("/") != 1 or target.startswith(("/", ".", "~")):
        raise TaggerError(target, "no such directory")
    try:
        from transformers.utils.hub import cached_file
    except ModuleNotFoundError as exc:
        raise MissingExtraError("transformers", "codec") from exc
    try:
        config = cached_file(target, "config.json", local_files_only=True)
    except (OSError, ValueError) as exc:
        raise TaggerError(target, hint) from exc
    if config is None:
        raise TaggerError(target, hint)
    return Path(config).parent


def model_sha256(directory: Path) -> str:
    """Digest of a model's files, 64 hex digits: over ``name, NUL, SHA-256(content)`` of each.

    Raises:
        TaggerError: there is no ``config.json``, or no weights as safetensors.
    """
    try:
        paths = sorted(
            path for path in directory.iterdir() if path.suffix in MODEL_FILES and path.is_file()
        )
        names = [path.name for path in paths]
        if "config.json" not in names:
            raise TaggerError(str(directory), "config.json is missing")
        if not any(name.endswith(".safetensors") for name in names):
            raise TaggerError(str(directory), "no .safetensors: weights are never unpickled here")
        digest = hashlib.sha256()
        for path in paths:
            content = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    content.update(chunk)
            digest.update(path.name.encode() + b"\0" + content.digest())
    except OSError as exc:
        raise TaggerError(str(directory), str(exc)) from exc
    return digest.hexdigest()


def _read_only(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A view that user code cannot change: the same samples are encoded next."""
    view = image.view()
    view.flags.writeable = False
    return view
