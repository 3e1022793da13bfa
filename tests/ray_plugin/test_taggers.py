"""A tagger in Ray's workers: made there from its description."""

import pytest

from dicmh_ray.codec.image_taggers import TaggerSpec
from dicmh_ray.errors import TaggerError
from dicmh_ray.ray_plugin import compress
from dicmh_ray.reader import ArchiveReader
from tests.fake_codec import FakeCodec
from tests.small_collections import write_tars

pytestmark = pytest.mark.ray


def test_workers_tag_as_a_loop_does(cluster, tmp_path):
    tars = write_tars(tmp_path)
    tagger = TaggerSpec.parse("tests.user_taggers:Sizes", threshold=0.5)
    rows = {}
    for runtime in ("ray", "local"):
        archive = str(tmp_path / runtime)
        compress(tars, archive, codec=FakeCodec, tagger=tagger, runtime=runtime)
        rows[runtime] = list(ArchiveReader.open(archive).rows())
    assert rows["ray"] == rows["local"]
    assert {row.tags for row in rows["ray"]} == {("picture", "wide")}


def test_a_tagger_that_breaks_its_contract_in_a_worker_ends_the_job(cluster, tmp_path):
    tagger = TaggerSpec.parse("tests.user_taggers:shy")
    with pytest.raises(TaggerError, match="gave 0 results"):
        compress(write_tars(tmp_path), str(tmp_path / "a"), codec=FakeCodec, tagger=tagger)
