"""A codec that travels: what a job's workers load, on whatever machine they are."""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dicmh_ray.codec import DEFAULT_CHECKPOINT, ImageCodec, load_codec, read_checkpoint
from dicmh_ray.codec.checkpoint import TAGGER_FILE
from dicmh_ray.errors import CodecMismatchError, WeightsError
from dicmh_ray.pipeline.encode import EncodeOptions


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A codec that can be sent to another machine and loaded there."""

    codec_id: str
    """What the archive is written with; a worker that loads another one refuses."""

    files: Mapping[str, bytes] = field(repr=False)
    """Relative name -> content, to bundle in the archive; also what workers load where the
    checkpoint is not the package's own."""

    factory: Callable[[], ImageCodec] | None = None
    """Makes the codec in place of ``load_codec``; must pickle."""

    is_default: bool = False
    """Whether every worker has it in its installed package."""

    @classmethod
    def open(cls, codec: "str | Path | Callable[[], ImageCodec]") -> "Checkpoint":
        """Read a checkpoint by name or directory, or ask a factory for its codec's identity.

        Raises:
            WeightsError: the checkpoint is missing or incomplete.
        """
        if callable(codec):
            return cls(codec_id=codec().codec_id, files={}, factory=codec)
        found = read_checkpoint(codec)
        is_default = codec == DEFAULT_CHECKPOINT
        return cls(codec_id=found.codec_id, files=found.files, is_default=is_default)

    def tagger_sha256(self) -> str:
        """Digest of the checkpoint's tagger. Raises WeightsError when it has none."""
        if TAGGER_FILE not in self.files:
            raise WeightsError(self.codec_id[:16], "it has no tagger that could suggest tags")
        return hashlib.sha256(self.files[TAGGER_FILE]).hexdigest()

    def load(self, options: EncodeOptions) -> ImageCodec:
        """The codec, in this process. Raises CodecMismatchError when it is not the job's."""
        if self.factory is not None:
            codec = self.factory()
        elif self.is_default:
            codec = load_codec(device=options.device, threads=options.threads)
        else:
            with tempfile.TemporaryDirectory(prefix="dicmh-codec-") as folder:
                for name, content in self.files.items():
                    path = Path(folder, name)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                codec = load_codec(folder, device=options.device, threads=options.threads)
        if codec.codec_id != self.codec_id:
            raise CodecMismatchError(self.codec_id, codec.codec_id)
        return codec
