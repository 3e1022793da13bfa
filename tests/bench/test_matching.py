"""Equal bytes: never more than ours where the peer can, its smallest and said so where not."""

import dataclasses

import pytest

from dicmh_ray import bench
from dicmh_ray.bench.matching import CLOSE_ENOUGH, PeerFiles
from tests.bench.tiny import JPEG, WEBP, a_picture

IMAGE = a_picture(96, 128)


def sizes_of(peer, qualities):
    return {quality: len(peer.encode(IMAGE, quality)) for quality in qualities}


@pytest.mark.parametrize("peer", [JPEG, WEBP], ids=lambda peer: peer.name)
@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_a_match_is_the_best_that_does_not_cost_more(peer, share):
    smallest, largest = sizes_of(peer, (0, peer.best_quality)).values()
    wanted = int(smallest + share * (largest - smallest))
    match = PeerFiles(peer, IMAGE).match(wanted)
    assert not match.is_over
    assert len(match.file.data) <= wanted
    is_close = len(match.file.data) >= (1 - CLOSE_ENOUGH) * wanted
    assert is_close or len(peer.encode(IMAGE, match.file.quality + 1)) > wanted


def test_a_peer_that_cannot_get_so_small_gives_its_smallest_and_says_so():
    match = PeerFiles(JPEG, IMAGE).match(50)
    assert match.is_over
    assert match.file.quality == 0
    assert len(match.file.data) > 50


def test_a_peer_that_cannot_get_so_large_gives_its_best():
    match = PeerFiles(JPEG, IMAGE).match(10**6)
    assert not match.is_over
    assert match.file.quality == JPEG.best_quality


class CountingPeer(bench.Peer):
    """Remembers what was asked of it."""

    asked: list[int] = []  # noqa: RUF012

    def encode(self, image, quality):
        self.asked.append(quality)
        return super().encode(image, quality)


def test_a_quality_is_encoded_once_and_a_search_starts_from_what_is_known():
    values = {one.name: getattr(JPEG, one.name) for one in dataclasses.fields(JPEG)}
    files = PeerFiles(CountingPeer(**values), IMAGE)
    files.file(40)
    wanted = len(files.file(40).data)
    assert files.match(wanted).file.quality == 40
    assert CountingPeer.asked == [40]
    files.match(wanted * 2)
    files.match(wanted * 2)
    assert len(CountingPeer.asked) == len(set(CountingPeer.asked)) == files.num_encoded
    assert files.num_encoded <= 8


def test_no_bytes_cannot_be_asked_for():
    with pytest.raises(ValueError, match="at least 1"):
        PeerFiles(JPEG, IMAGE).match(0)
