"""A head on latents as a task: classes without drawing a picture."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from dicmh_ray.analysis.task import Batch, Task
from dicmh_ray.errors import MissingExtraError


class LatentHeadTask(Task):
    """The most probable classes by a head of :mod:`dicmh_ray.codec.latent_head`."""

    name = "latent-head"
    reads = "latent"
    schema = pa.schema(
        [
            ("class", pa.int32()),
            ("label", pa.string()),
            ("score", pa.float32()),
            ("top_classes", pa.list_(pa.int32())),
            ("top_labels", pa.list_(pa.string())),
            ("top_scores", pa.list_(pa.float32())),
        ]
    )

    def __init__(self, data: bytes, *, states: int | None = None, top_k: int = 5) -> None:
        """
        Args:
            data: the head's file.
            states: of the latents; None is what the head was fitted to.
            top_k: how many classes of each picture are kept.

        Raises:
            WeightsError: the bytes are no head.
            MissingExtraError: torch is not installed.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}, wanted 1 or more")
        self.data, self.top_k = data, top_k
        head = self._head = self._loaded()
        self.codec_id = head.codec_id
        self.states = head.states if states is None else states

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_head": None}

    def parameters(self) -> Mapping[str, Any]:
        """The head's digest, and how many classes."""
        return {"head_sha256": hashlib.sha256(self.data).hexdigest(), "top_k": self.top_k}

    def setup(self) -> None:
        """Load the head, unless it is there."""
        if self._head is None:
            self._head = self._loaded()

    def __call__(self, batch: Batch) -> pa.Table:
        """See :class:`Task`."""
        odds = self._head.probabilities(batch.values)
        order = np.argsort(-odds, axis=1, kind="stable")[:, : self.top_k]
        scores = np.take_along_axis(odds, order, axis=1)
        names = self._head.labels
        columns: dict[str, Iterable[Any]] = {
            "class": order[:, 0].tolist(),
            "label": [names[one] for one in order[:, 0]],
            "score": scores[:, 0].tolist(),
            "top_classes": order.tolist(),
            "top_labels": [[names[one] for one in row] for row in order],
            "top_scores": scores.tolist(),
        }
        return batch.table(**columns)

    def _loaded(self) -> Any:
        try:
            from dicmh_ray.codec.latent_head import LatentHead
        except ModuleNotFoundError as exc:
            if exc.name not in ("torch", "safetensors"):
                raise
            raise MissingExtraError(exc.name, "codec") from exc
        return LatentHead.from_bytes(self.data)
