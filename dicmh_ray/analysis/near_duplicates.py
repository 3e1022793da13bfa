"""Pictures that are nearly the same, found from latents: no picture is drawn.

    embedding ──signs along random directions──> 32 words of 16 bits
    rows that share a word ──cosine of the embeddings──> pairs ──joined──> groups

Two vectors with cosine c agree in a sign with probability 1 - acos(c) / pi: at 0.9 in 0.856, so that
all 16 bits of some word agree with probability 1 - (1 - 0.856**16)**32 = 0.94, at 0.95 with 0.998.
The words only propose; every pair that counts was compared.
"""

import hashlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from dicmh_ray.analysis.latent_tasks import DIMENSIONS, EmbedLatent
from dicmh_ray.analysis.survey import Ground, Survey
from dicmh_ray.analysis.task import ERROR, KEY, Task
from dicmh_ray.errors import ResultsError

WORDS, WORD_BITS = 32, 16

WINDOW = 64
"""Rows of one word that are compared with each other; of a larger crowd each with so many next to it."""

_CHUNK = 200_000
"""Pairs compared at once: it bounds memory."""

GROUPS_SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("key", pa.string()),
        ("is_representative", pa.bool_()),
        ("similarity", pa.float32()),
        ("is_exact", pa.bool_()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]


class NearDuplicates(Survey):
    """Table ``groups``: a row for each picture that has a near duplicate.

    The representative is the largest of its group; ``similarity`` is the cosine with it, and
    ``is_exact`` says that the source bytes were the same. Two pictures are in one group if there is
    a chain of pairs above the threshold between them. Needs memory for 1 KiB a picture.
    """

    name = "near-duplicates"
    version = "3"
    tables = ("groups",)

    def __init__(self, *, threshold: float = 0.9, states: int | None = 2) -> None:
        """
        Args:
            threshold: least cosine of two embeddings; docs/analysis.md has what it finds.
            states: of the latents.
        """
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}, wanted above 0, up to 1")
        self.threshold, self.states = threshold, states

    def parameters(self) -> Mapping[str, Any]:
        """The threshold."""
        return {"threshold": self.threshold}

    def needs(self) -> Task:
        """Embeddings."""
        return EmbedLatent(states=self.states)

    def __call__(self, ground: Ground) -> Mapping[str, pa.Table]:
        """See :class:`Survey`."""
        if ground.results is None:
            raise ResultsError(ground.reader.snapshot.uri, self.name, "needs embeddings")
        table = ground.results.table([KEY, "embedding", ERROR])
        found = table[ERROR].is_null()
        all_facts = _facts(ground, table[KEY].to_pylist())
        facts = [
            row for row, is_found in zip(all_facts, found.to_pylist(), strict=True) if is_found
        ]
        table = table.filter(found)
        digests = [row["original_sha256"] for row in facts]
        embeddings = _matrix(table["embedding"])
        pairs = [
            *similar_pairs(embeddings, self.threshold),
            *_same_bytes(digests),
        ]
        rows = []
        for number, members in enumerate(_joined(len(facts), pairs)):
            members.sort(key=lambda i: (-_pixels(facts[i]), facts[i]["key"]))
            first = members[0]
            for i in members:
                is_exact = bool(digests[i]) and digests[i] == digests[first]
                cosine = 1.0 if is_exact else float(embeddings[i] @ embeddings[first])
                rows.append(
                    {
                        "group": number,
                        "key": facts[i]["key"],
                        "is_representative": i == first,
                        "similarity": min(cosine, 1.0),
                        "is_exact": is_exact,
                        "width": facts[i]["width"],
                        "height": facts[i]["height"],
                    }
                )
        return {"groups": pa.Table.from_pylist(rows, schema=GROUPS_SCHEMA)}


def similar_pairs(embeddings: Floats, threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs of rows with a cosine of at least ``threshold``: a few of those near it are missed.

    Args:
        embeddings: float32 ``[N, D]``, rows of length 1; a row of zeros is like nothing.
        threshold: least cosine.
    """
    there = np.flatnonzero((embeddings != 0).any(axis=1))
    signs = embeddings[there] @ _planes(embeddings.shape[1]).T > 0
    packed = np.packbits(signs, axis=1).view(">u2").astype(np.int64)
    seen: set[int] = set()
    for word in range(packed.shape[1]):
        # Within one word the rows lie in the order of the next: those alike are near each other.
        order = np.lexsort((packed[:, (word + 1) % packed.shape[1]], packed[:, word]))
        values = packed[order, word]
        for distance in range(1, WINDOW):
            same = np.flatnonzero(values[distance:] == values[:-distance])
            if not len(same):
                break
            for start in range(0, len(same), _CHUNK):
                some = same[start : start + _CHUNK]
                a, b = there[order[some]], there[order[some + distance]]
                cosines = np.einsum("nd,nd->n", embeddings[a], embeddings[b])
                for i in np.flatnonzero(cosines >= threshold):
                    one, other = sorted((int(a[i]), int(b[i])))
                    code = one * len(embeddings) + other
                    if code not in seen:
                        seen.add(code)
                        yield one, other


def _planes(dimensions: int) -> Floats:
    count = WORDS * WORD_BITS * dimensions
    bits = hashlib.shake_128(f"dicmh signs {dimensions}".encode()).digest(-(-count // 8))
    signs = np.unpackbits(np.frombuffer(bits, np.uint8))[:count].astype(np.float32)
    return signs.reshape(WORDS * WORD_BITS, dimensions) * 2 - 1


def _same_bytes(digests: list[str]) -> Iterator[tuple[int, int]]:
    """Each row with the first one that has the same source bytes."""
    first: dict[str, int] = {}
    for i, digest in enumerate(digests):
        if digest and first.setdefault(digest, i) != i:
            yield first[digest], i


def _joined(count: int, pairs: list[tuple[int, int]]) -> list[list[int]]:
    """Groups of two or more, in the order of their first members."""
    root = list(range(count))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for a, b in pairs:
        a, b = sorted((find(a), find(b)))
        root[b] = a
    groups: dict[int, list[int]] = {}
    for i in sorted({i for pair in pairs for i in pair}):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def _facts(ground: Ground, keys: list[str]) -> list[dict[str, Any]]:
    """Of the rows of results. Units may share a key, and have each of theirs once: of equal keys
    the first row is that of the first result."""
    columns = ["key", "width", "height", "original_sha256"]
    rows: dict[str, deque[dict[str, Any]]] = defaultdict(deque)
    for batch in ground.reader.scan(columns, ground.where):
        for row in batch.to_pylist():
            rows[row["key"]].append(row)
    return [rows[key].popleft() for key in keys]


def _pixels(row: Mapping[str, Any]) -> int:
    return (row["width"] or 0) * (row["height"] or 0)


def _matrix(column: pa.ChunkedArray) -> Floats:
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, np.float32).reshape(-1, DIMENSIONS)
