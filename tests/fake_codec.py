"""The codec without torch, under the name that the tests know it by."""

from dicmh_ray.testing.fake_codec import KEEP_BITS, POISON, FakeCodec

__all__ = ["KEEP_BITS", "POISON", "FakeCodec"]
