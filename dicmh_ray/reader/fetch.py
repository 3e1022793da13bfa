"""Bytes of a snapshot's objects, from its store or from the local cache in front of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dicmh_ray.archive import PartFacts, Store
from dicmh_ray.archive.commit import ObjectFacts
from dicmh_ray.archive.range_cache import RangeCache
from dicmh_ray.archive.ranges import ByteRange, read_ranges
from dicmh_ray.archive.snapshot import check_object
from dicmh_ray.errors import CorruptObjectError


@dataclass(kw_only=True, slots=True)
class Fetched:
    """What some byte ranges of an object hold."""

    name: str
    """The object."""

    ranges: Sequence[ByteRange]
    """Where the bytes are."""

    values: list[bytes]
    """In the order asked for; ``b""`` in the place of what could not be read."""

    fresh: Sequence[int]
    """Places in ``values`` of what came from the store, not from the cache."""

    reasons: dict[int, str] = field(default_factory=dict)
    """Why a value could not be read, by its place."""


class Fetcher:
    """Reads ranges of objects that were committed. Thread-safe."""

    def __init__(self, store: Store, digests: Mapping[str, str], cache: RangeCache | None) -> None:
        self.store = store
        """Where the objects are."""
        self._digests = digests
        self._cache = cache

    def whole(self, facts: ObjectFacts | PartFacts) -> bytes:
        """A whole object, its SHA-256 verified.

        Raises:
            CorruptObjectError: it is missing or damaged.
        """
        place = ByteRange(0, facts.num_bytes)
        if self._cache is not None:
            held = self._cache.get(facts.sha256, place)
            if held is not None:
                return held
        try:
            data = self.store.get(facts.name)
        except FileNotFoundError as exc:
            raise CorruptObjectError(facts.name, "is missing") from exc
        check_object(facts, data)
        if self._cache is not None:
            self._cache.put(facts.sha256, [(place, data)])
        return data

    def ranges(self, name: str, ranges: Sequence[ByteRange], *, max_gap: int) -> Fetched:
        """Some byte ranges of an object, in few requests.

        Raises:
            FileNotFoundError: there is no such object.
            CorruptObjectError: it ends before a range does.
        """
        digest = self._digests.get(name)
        values: list[bytes | None] = [None] * len(ranges)
        if self._cache is not None and digest is not None:
            values = self._cache.get_many(digest, ranges)
        missing = [i for i, value in enumerate(values) if value is None]
        read = read_ranges(self.store, name, [ranges[i] for i in missing], max_gap=max_gap)
        for i, data in zip(missing, read, strict=True):
            values[i] = data
        return Fetched(
            name=name, ranges=ranges, values=[value or b"" for value in values], fresh=missing
        )

    def ranges_each(self, name: str, ranges: Sequence[ByteRange], *, max_gap: int) -> Fetched:
        """As :meth:`ranges`, and one that the object is too short for costs no other.

        Raises:
            FileNotFoundError: there is no such object.
        """
        try:
            return self.ranges(name, ranges, max_gap=max_gap)
        except CorruptObjectError:
            pass  # which of them lie beyond its end is found one by one
        singles = Fetched(name=name, ranges=ranges, values=[b""] * len(ranges), fresh=[])
        fresh = []
        for i, place in enumerate(ranges):
            try:
                one = self.ranges(name, [place], max_gap=0)
            except CorruptObjectError as exc:
                singles.reasons[i] = exc.reason
                continue
            singles.values[i] = one.values[0]
            fresh += [i] * len(one.fresh)
        singles.fresh = fresh
        return singles

    def keep(self, fetched: Fetched, wanted: Iterable[int] | None = None) -> None:
        """Put values into the cache. The caller has checked them: it never holds unchecked bytes.

        Args:
            fetched: what was read.
            wanted: places of the sound values; None is all.
        """
        digest = self._digests.get(fetched.name)
        if self._cache is None or digest is None:
            return
        sound = set(range(len(fetched.values)) if wanted is None else wanted)
        sound -= fetched.reasons.keys()
        self._cache.put(
            digest, [(fetched.ranges[i], fetched.values[i]) for i in fetched.fresh if i in sound]
        )
