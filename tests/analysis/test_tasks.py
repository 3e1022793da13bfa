"""The tasks that come with the package, on tiny nets and latents."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from dicmh_ray.analysis import (
    BUILT_IN,
    EmbedLatent,
    LatentHeadTask,
    NearDuplicates,
    TagStatistics,
    TaskOptions,
    fit_head,
    load_task,
    plan_analysis,
    read_results,
    read_survey,
)
from dicmh_ray.analysis.latent_tasks import DIMENSIONS, colours_of, embedding, pooled
from dicmh_ray.analysis.near_duplicates import similar_pairs
from dicmh_ray.errors import (
    CodecMismatchError,
    NetError,
    ResultsError,
    TaskError,
    WeightsError,
)
from dicmh_ray.ray_plugin.analysis import analyze
from dicmh_ray.views import open_archive
from tests.analysis.user_tasks import Brightness
from tests.bench.tiny import save_constant, save_feature_net, save_segmenter
from tests.fake_codec import FakeCodec
from tests.small_collections import picture

EVEN = "'even' in tags"

BOXES = np.array([[0.1, 0.1, 0.3, 0.3], [0.11, 0.1, 0.3, 0.3], [0.5, 0.5, 0.9, 0.9]])
SCORES = np.array([[0.1, 0.9], [0.2, 0.8], [0.95, 0.05]])


def describe(folder, name, task, **fields):
    lines = [f"[{name}]", f'file = "{name}.onnx"', f'task = "{task}"']
    lines += [f"{field} = {value!r}".replace("'", '"') for field, value in fields.items()]
    (folder / "nets.toml").write_text("\n".join(lines) + "\n")
    return folder / f"{name}.onnx"


@pytest.fixture
def classifier(tmp_path):
    folder = tmp_path / "nets"
    folder.mkdir()
    save_feature_net(describe(folder, "tiny", "classification"))
    (folder / "names.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    return folder


def run(snapshot, codec, name, where=EVEN, **options):
    task = load_task(name, TaskOptions(**options))
    analyze(snapshot, task, codec=codec, where=where)
    return read_results(snapshot, task, where=where).table().to_pylist()


def test_classes_come_with_names_and_probabilities(snapshot, codec, classifier):
    rows = run(
        snapshot, codec, "classify",
        net=str(classifier / "tiny.onnx"), names=str(classifier / "names.txt"), top_k=3,
    )  # fmt: skip
    assert len(rows) == 6
    for row in rows:
        assert row["class"] == row["top_classes"][0]
        assert row["label"] == ["ant", "bee", "cat", "dog", "elk"][row["class"]]
        assert row["score"] == pytest.approx(row["top_scores"][0])
        assert sorted(row["top_scores"], reverse=True) == row["top_scores"]
        assert sum(row["top_scores"]) <= 1 + 1e-6


def test_names_must_be_as_many_as_classes(snapshot, codec, classifier, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\n")
    with pytest.raises(NetError, match="has 5 classes, there are 2 names"):
        run(
            snapshot, codec, "classify",
            net=str(classifier / "tiny.onnx"), names=str(names),
        )  # fmt: skip
    detector = str(describe(tmp_path, "boxes", "detection", layout="boxes"))
    save_constant(detector, {"scores": SCORES[None], "boxes": BOXES[None]})
    with pytest.raises(NetError, match="has 1 classes"):
        run(snapshot, codec, "detect", net=detector, names=str(names))


def test_things_faces_points_and_regions_are_listed(snapshot, codec, tmp_path):
    def net(name, task, save, *arguments, **fields):
        folder = tmp_path / name
        folder.mkdir()
        save(describe(folder, name, task, **fields), *arguments)
        return str(folder / f"{name}.onnx")

    listed = {"scores": SCORES[None], "boxes": BOXES[None]}
    detector = net("boxes", "detection", save_constant, listed, layout="boxes")
    (row, *_) = run(snapshot, codec, "detect", net=detector)
    assert row["count"] == 1  # the second is a repeat of the first, the third is nothing
    assert row["boxes"] == [pytest.approx(BOXES[0].tolist())]
    assert (row["classes"], row["labels"]) == ([0], [None])
    faces = net("face", "faces", save_constant, listed, layout="boxes")
    assert run(snapshot, codec, "faces", net=faces, min_score=0.95)[0]["count"] == 0
    points = net("points", "landmarks", save_constant, {"p": np.array([[0.5, 0.25, 1, 0]])})
    (row, *_) = run(snapshot, codec, "landmarks", net=points)
    assert row["points"] == [[0.5, 0.25], [1.0, 0.0]]
    masks = net("mask", "segmentation", save_segmenter)
    (row, *_) = run(snapshot, codec, "segment", net=masks)
    mask = np.asarray(Image.open(io.BytesIO(row["mask"])))
    assert mask.shape == (16, 16)
    shares = dict(zip(row["classes"], row["shares"], strict=True))
    assert shares == {c: pytest.approx((mask == c).mean()) for c in np.unique(mask).tolist()}


def test_embeddings_of_a_net_have_unit_length_and_may_read_small_pictures(
    snapshot, codec, classifier
):
    net = f"{classifier}/tiny.onnx:deep"
    rows = run(snapshot, codec, "embed", net=net, view="thumbnail")
    assert {len(row["embedding"]) for row in rows} == {5}
    assert np.linalg.norm(rows[0]["embedding"]) == pytest.approx(1, abs=1e-6)


def test_a_net_travels_without_its_file(snapshot, codec, classifier):
    task = load_task("classify", TaskOptions(net=str(classifier / "tiny.onnx")))
    before = plan_analysis(snapshot, task)[2].task
    (classifier / "tiny.onnx").unlink()
    copy = pickle.loads(pickle.dumps(task))
    assert plan_analysis(snapshot, copy)[2].task == before
    analyze(snapshot, copy, codec=codec)


def test_tasks_that_cannot_be_are_refused_by_name(classifier, tmp_path):
    net = str(classifier / "tiny.onnx")
    for name, options in [
        ("classify", {}),
        ("classify", {"net": net, "threshold": 0.5}),
        ("classify", {"net": f"{net}:deep"}),
        ("faces", {"net": net, "names": net}),
        ("embed", {"net": net}),
        ("latent-head", {}),
        ("tags", {"states": 1}),
        ("nonsense", {}),
        ("no.such.module:Task", {}),
        ("tests.analysis.user_tasks:Missing", {}),
        ("tests.analysis.user_tasks:NOT_A_TASK", {}),
        ("tests.analysis.user_tasks:Brightness", {"net": net}),
    ]:
        with pytest.raises(TaskError):
            load_task(name, TaskOptions(**options))
    with pytest.raises(NetError, match="wanted detection"):
        load_task("detect", TaskOptions(net=net))
    with pytest.raises(NetError, match="not there"):
        load_task("classify", TaskOptions(net=str(tmp_path / "gone.onnx")))
    (classifier / "other.onnx").write_bytes(b"")
    with pytest.raises(NetError, match="does not describe it"):
        load_task("classify", TaskOptions(net=str(classifier / "other.onnx")))
    with pytest.raises(ValueError, match="human"):
        load_task("classify", TaskOptions(net=net, view="human"))
    assert isinstance(load_task("tests.analysis.user_tasks:Brightness"), Brightness)
    assert len(set(BUILT_IN)) == len(BUILT_IN)


def test_pooling_is_by_region_and_repeats_what_is_too_small():
    latent = np.arange(2 * 8 * 4, dtype=np.float16).reshape(2, 8, 4)
    assert pooled(latent, 4) == pytest.approx(
        latent.astype(np.float32).reshape(2, 4, 2, 4, 1).mean(axis=(2, 4))
    )
    assert pooled(latent[:, :1, :1], 4) == pytest.approx(
        np.broadcast_to(latent[:, :1, :1], (2, 4, 4))
    )
    assert pooled(latent[:, :6, :3], 4).shape == (2, 4, 4)


class TexturedCodec(FakeCodec):
    """Its latents: colours turned and shifted, between channels that say nothing of them."""

    def decode_latent(self, bitstreams, *, states=None):
        turned = [[3, 1, 0], [0, 0, 0], [1, -2, 1], [1, 1, 1]]
        return [
            np.einsum("kc,chw->khw", turned, latent.astype(np.float32)).astype(np.float16) + 5
            for latent in super().decode_latent(bitstreams, states=states)
        ]


def test_colours_are_read_off_latents_whatever_channels_a_codec_has():
    codec = TexturedCodec()
    colours = colours_of(codec)
    assert colours.shape == (3, 4)
    streams = codec.encode([picture(1, height=16, width=24)], tags=[()], exif_orientations=[1])
    (latent,) = codec.decode_latent(streams)
    found = np.einsum("kc,chw->hwk", colours, latent.astype(np.float32))
    shown = picture(1, height=16, width=24) / 255
    assert np.allclose(found - found.mean((0, 1)), shown - shown.mean((0, 1)), atol=0.01)


def test_an_embedding_is_of_layout_not_of_brightness_or_texture():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(6, 12, 9)).astype(np.float16)
    colours = np.eye(3, 6, dtype=np.float32)
    one = embedding(latent, colours)
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5)
    assert one @ embedding(latent + np.float16(2), colours) > 0.999
    other = rng.normal(size=(6, 12, 9)).astype(np.float16)
    assert abs(one @ embedding(other, colours)) < 0.5
    other[:3] = latent[:3]
    assert one @ embedding(other, colours) == pytest.approx(1, abs=1e-5)
    assert not embedding(np.ones((6, 12, 9), np.float16), colours).any()


def test_similar_vectors_are_found_and_no_others():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(300, 256)).astype(np.float32)
    vectors[200:300] = vectors[:100] + 0.1 * rng.normal(size=(100, 256))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[150] = 0
    found = set(similar_pairs(vectors, 0.95))
    assert found == {(i, 200 + i) for i in range(100)}


def test_a_crowd_of_equal_vectors_is_one_chain_and_costs_no_more_than_its_size():
    vectors = np.zeros((500, 8), np.float32)
    vectors[:, 0] = 1
    pairs = set(similar_pairs(vectors, 0.9))
    assert {(i, i + 1) for i in range(499)} <= pairs
    assert len(pairs) < 500 * 64


def collection_with_repeats(tmp_path, codec):
    from dicmh_ray.ray_plugin import compress
    from tests.small_collections import bmp, write_tar

    images = {f"p{i}": picture(40 * i, height=64, width=64) for i in range(4)}
    images["p1-again"] = images["p1"]
    images["p2-darker"] = images["p2"] // 32 * 32
    images["flat-1"] = np.full((64, 64, 3), 40, np.uint8)
    images["flat-2"] = np.full((64, 64, 3), 90, np.uint8)
    write_tar(tmp_path / "x.tar", {name: bmp(image) for name, image in images.items()})
    compress(str(tmp_path / "x.tar"), str(tmp_path / "dups"), codec=FakeCodec, runtime="local")
    return open_archive(str(tmp_path / "dups"), codec=codec)


def test_near_duplicates_are_grouped_from_latents_alone(tmp_path, codec):
    archive = collection_with_repeats(tmp_path, codec)
    survey = NearDuplicates(threshold=0.97, states=None)
    with pytest.raises(ResultsError):
        read_survey(archive.reader.snapshot, survey)
    codec.num_decoded = 0
    analyze(archive.reader.snapshot, survey, codec=codec)
    assert codec.num_decoded == 0
    rows = read_survey(archive.reader.snapshot, survey)["groups"].to_pylist()
    groups = {}
    for row in rows:
        groups.setdefault(row["group"], set()).add(row["key"].rpartition("/")[2])
    assert {frozenset(group) for group in groups.values()} == {
        frozenset({"p1", "p1-again"}),
        frozenset({"p2", "p2-darker"}),
    }
    exact = {row["key"].rpartition("/")[2]: row["is_exact"] for row in rows}
    assert exact == {"p1": True, "p1-again": True, "p2": True, "p2-darker": False}
    assert sum(row["is_representative"] for row in rows) == 2
    assert all(row["similarity"] >= 0.97 for row in rows)


def test_rows_of_one_key_are_compared_as_what_they_are(tmp_path, codec):
    from dicmh_ray.ray_plugin import compress
    from tests.small_collections import bmp, write_tar

    tar, uri = tmp_path / "x.tar", str(tmp_path / "again")
    first = picture(40, height=64, width=64)
    for image in (first, first[:60] // 32 * 32):  # a tar that was changed is new as a whole
        write_tar(tar, {"p": bmp(image)})
        compress(str(tar), uri, codec=FakeCodec, runtime="local", append=image is not first)
    archive = open_archive(uri, codec=codec)
    survey = NearDuplicates(states=None)
    analyze(archive.reader.snapshot, survey, codec=codec)
    rows = read_survey(archive.reader.snapshot, survey)["groups"].to_pylist()
    assert [row["key"] for row in rows] == ["p", "p"]
    assert [(row["height"], row["is_exact"]) for row in rows] == [(64, True), (60, False)]


def test_tag_statistics_need_the_index_alone(snapshot, codec, monkeypatch):
    read = []
    get_range = type(snapshot.store).get_range
    monkeypatch.setattr(
        type(snapshot.store),
        "get_range",
        lambda self, name, *place: read.append(name) or get_range(self, name, *place),
    )
    done = analyze(snapshot, TagStatistics(), codec=codec)
    assert not any(name.startswith("data/") for name in read)
    tables = read_survey(snapshot, done.results)
    tags = {row["tag"]: row for row in tables["tags"].to_pylist()}
    assert set(tags) == {None, "even", "odd", "u0", "u1", "u2"}
    assert [tags[tag]["images"] for tag in (None, "even", "u1")] == [15, 6, 4]
    assert (tags["even"]["as_main"], tags["u1"]["as_main"]) == (6, 0)
    assert (tags[None]["kept_originals"], tags["odd"]["kept_originals"]) == (3, 0)
    assert tags["even"]["stream_bytes"] > tags["even"]["first_state_bytes"] > 0
    assert tags["even"]["bpp"] == pytest.approx(8 * tags["even"]["stream_bytes"] / (6 * 24 * 32))
    assert (tags["even"]["min_side"], tags["even"]["max_side"]) == (24, 32)
    pairs = {(row["tag"], row["other"]): row for row in tables["pairs"].to_pylist()}
    assert pairs["even", "u0"]["images"] == 2
    assert pairs["even", "u0"]["lift"] == pytest.approx(2 * 15 / (6 * 4))
    assert analyze(snapshot, TagStatistics()).results == done.results
    filtered = analyze(snapshot, TagStatistics(), where=EVEN)
    assert filtered.results != done.results
    assert len(read_survey(snapshot, filtered.results)["tags"]) == 5


@pytest.fixture(scope="module")
def fitted(archive_folder):
    pytest.importorskip("torch").set_num_threads(1)
    archive = open_archive(archive_folder, codec=FakeCodec())
    return fit_head(archive, label="tag", states=2, left_out=0.3, width=8, epochs=10)


def test_a_head_is_fitted_to_tags_and_tested_on_others(fitted):
    head, report = fitted
    assert report.classes == ("even", "odd")
    assert report.fitted_to + report.left_out == 12
    assert report.left_out > 0
    assert 0 <= report.accuracy <= 1
    assert head.provenance["states"] == 2


def test_a_head_comes_back_from_its_file(fitted):
    head, _ = fitted
    copy = type(head).from_bytes(head.to_bytes())
    latents = [np.random.default_rng(i).normal(size=(3, 5, 6 + i)) for i in range(3)]
    assert (copy.probabilities(latents) == head.probabilities(latents)).all()
    assert (copy.labels, copy.codec_id, copy.states) == (("even", "odd"), "ab" * 32, 2)
    with pytest.raises(WeightsError):
        type(head).from_bytes(head.to_bytes()[:-9])
    with pytest.raises(ValueError, match="channels"):
        head.probabilities([np.zeros((4, 5, 6), np.float16)])


def test_a_head_learns_what_there_is_to_learn():
    pytest.importorskip("torch").set_num_threads(1)
    from dicmh_ray.codec.latent_head import HeadOptions, LatentHead

    rng = np.random.default_rng(0)
    classes = [i % 2 for i in range(24)]
    latents = [
        rng.normal(size=(4, 6, 6 + i % 3)) + np.array([3 * c, 0, 0, 0])[:, None, None]
        for i, c in enumerate(classes)
    ]
    head = LatentHead.fit(
        latents[:16],
        classes[:16],
        labels=("a", "b"),
        codec_id="ab" * 32,
        states=None,
        options=HeadOptions(width=8, epochs=20, batch_size=8),
    )
    assert head.probabilities(latents[16:]).argmax(axis=1).tolist() == classes[16:]


def test_a_head_runs_as_a_task_of_its_own_checkpoint(fitted, snapshot, codec, tmp_path):
    head, _ = fitted
    (tmp_path / "head").write_bytes(head.to_bytes())
    task = load_task("latent-head", TaskOptions(head=str(tmp_path / "head"), top_k=2))
    assert isinstance(task, LatentHeadTask)
    assert task.states == 2
    analyze(snapshot, pickle.loads(pickle.dumps(task)), codec=codec)
    rows = read_results(snapshot, task).table().to_pylist()
    assert {row["label"] for row in rows if not row["error"]} <= {"even", "odd"}
    assert sum(row["error"] is not None for row in rows) == 3  # without a stream
    assert codec.num_decoded == 0
    task.codec_id = "cd" * 32
    with pytest.raises(CodecMismatchError):
        plan_analysis(snapshot, task)


def test_a_label_of_which_there_are_too_few_is_no_class(archive_folder):
    pytest.importorskip("torch")
    archive = open_archive(archive_folder, codec=FakeCodec())
    with pytest.raises(TaskError, match="0 classes"):
        fit_head(archive, label="metadata.nothing")
    with pytest.raises(ValueError, match="wanted 'tag'"):
        fit_head(archive, label="status")


def test_latent_embeddings_are_results_as_any(snapshot, codec):
    done = analyze(snapshot, EmbedLatent(), codec=codec)
    assert done.report.causes == {"has no bitstream, its status is kept_original": 3}
    rows = read_results(snapshot, EmbedLatent()).table().to_pylist()
    assert {len(row["embedding"]) for row in rows if row["error"] is None} == {DIMENSIONS}
