"""What is measured of our own codec is what a reader gets."""

import threading

from PIL import Image

from dicmh_ray.bench.subject import Subject
from tests.bench.tiny import CodecWithMsSsim, a_picture


class RememberingCodec(CodecWithMsSsim):
    """Knows what it has just encoded, and whether it was asked to decode that."""

    def __init__(self):
        super().__init__()
        self.remembered = []
        self.recalled = 0

    def encode(self, images, *, tags, exif_orientations):
        streams = super().encode(images, tags=tags, exif_orientations=exif_orientations)
        self.remembered = streams
        return streams

    def decode(self, bitstreams, *, states=None, view="machine"):
        self.recalled += any(s.startswith(b) for s in self.remembered for b in bitstreams)
        return super().decode(bitstreams, states=states)


def test_decoding_is_timed_on_streams_that_the_codec_does_not_remember(tmp_path):
    Image.fromarray(a_picture()).save(tmp_path / "a.png")
    codec = RememberingCodec()
    subject = Subject("a", tmp_path / "a.png", codec, peers=(), codec_lock=threading.Lock())
    assert codec.remembered == [subject.stream]
    for state in range(1, len(subject.prefix_bytes) + 1):
        subject.ours(state, "machine")
    assert codec.recalled == 0
