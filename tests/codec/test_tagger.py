"""The tagger: its figures on hand cases, its file, and its way from a label to a column."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from dicmh_ray.bitstream import parse_bitstream
from dicmh_ray.cli import app
from dicmh_ray.codec import TagScore, TagSuggester, load_codec, read_checkpoint
from dicmh_ray.codec.image_taggers import without_known
from dicmh_ray.codec.layered_codec import LayeredCodec, load_layered_codec
from dicmh_ray.codec.tagger import (
    TaggerHead,
    num_features,
    picture_features,
    probability,
)
from dicmh_ray.codec.tagger_fitting import (
    LabelledPhotograph,
    average_precision,
    choose_threshold,
    fit_calibration,
    fit_linear,
    fit_tagger,
    random_folds,
    subject_folds,
)
from dicmh_ray.errors import SourceFormatError, WeightsError
from dicmh_ray.pipeline import EncodePolicy
from dicmh_ray.pipeline.job import Checkpoint
from dicmh_ray.reader import ArchiveReader
from dicmh_ray.tag_recipe import read_labelled, train_tagger, words_of_label
from tests.fake_codec import FakeCodec

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"


def drawn(kind: str, n: int) -> np.ndarray:
    """A picture that is easy to tell from those of the other kind: stripes down, or across."""
    y, x = np.mgrid[:64, : 80 + n]
    wave = 90 * np.sin((x if kind == "columns" else y) / (1.5 + n / 20))
    return np.repeat((128 + wave)[..., None], 3, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen labelled pictures of two kinds, one without a label, and a file that is no picture."""
    folder = tmp_path_factory.mktemp("stripes")
    rows = ["file,label"]
    for kind in ("columns", "rows"):
        for n in range(8):
            Image.fromarray(drawn(kind, n)).save(folder / f"{kind}{n}.png")
            rows.append(f"{kind}{n}.png,{kind.title()}")
    Image.fromarray(drawn("rows", 9)).save(folder / "other.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def checkpoint(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint with a tagger, made by the program."""
    folder = tmp_path_factory.mktemp("tagged") / "checkpoint"
    shutil.copytree(GOLDEN, folder)
    report = folder.parent / "tagger.md"
    result = CliRunner().invoke(
        app,
        f"train-tagger {photographs} --labels {photographs / 'labels.csv'} --checkpoint {folder} "
        f"-o {folder / 'tagger.safetensors'} --report {report} --device cpu",
    )
    assert result.exit_code == 0, result.output
    text = report.read_text()
    assert "| columns | 8 | 8 | 0.50 | 1.00 | 1.00 |" in text
    assert "For 1 other photographs" in text
    assert text in result.output
    return folder


@pytest.fixture(scope="module")
def codec(checkpoint: Path) -> LayeredCodec:
    return load_layered_codec(read_checkpoint(checkpoint), device="cpu")


def head_of(codec: LayeredCodec, checkpoint: Path) -> TaggerHead:
    data = (checkpoint / "tagger.safetensors").read_bytes()
    return TaggerHead.from_bytes(data, codec_id=codec.codec_id, channels=codec.latent_channels)


@pytest.mark.parametrize(
    ("scores", "labels", "wanted"),
    [
        ([4, 3, 2, 1], [1, 1, 0, 0], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], (1 / 3 + 2 / 4) / 2),
        ([4, 3, 2, 1], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([1, 1, 1, 1], [1, 0, 0, 0], 1 / 4),
        ([1, 1, 0, 0], [0, 1, 0, 1], (1 / 2 + 2 / 4) / 2),
        ([0.5], [1], 1.0),
    ],
)
def test_average_precision_of_hand_cases(scores, labels, wanted) -> None:
    assert average_precision(scores, labels) == pytest.approx(wanted)


def test_average_precision_without_a_positive_is_an_error() -> None:
    with pytest.raises(ValueError, match="positive"):
        average_precision([1, 2], [0, 0])


def test_the_threshold_has_the_highest_recall_at_the_wanted_precision() -> None:
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    found = choose_threshold(values, np.array([1, 1, 1, 1, 0, 0, 1], bool))
    assert found == (0.5, 0.8, 0.8)
    perfect = choose_threshold(values, np.array([1, 1, 1, 1, 1, 0, 0], bool))
    assert perfect == (0.5, 1.0, 1.0)
    assert choose_threshold(values, np.array([0, 1, 0, 1, 0, 1, 0], bool)) is None
    few = np.array([1, 1, 1, 0, 0, 0, 0], bool)
    assert choose_threshold(values, few) is None, "three suggestions prove nothing"


def test_calibration_gives_shares_as_probabilities() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=4000)
    labels = rng.random(4000) < 1 / (1 + np.exp(-(2 * scores - 1)))
    slope, offset = fit_calibration(scores, labels)
    assert slope == pytest.approx(2, abs=0.2)
    assert offset == pytest.approx(-1, abs=0.2)
    assert probability(0.0, slope, offset) == pytest.approx(0.27, abs=0.03)
    assert fit_calibration(-scores, labels)[0] < 0
    separable = fit_calibration(np.arange(8.0), np.arange(8) > 3)
    assert np.isfinite(separable).all()


def test_no_subject_is_on_both_sides_of_a_fold() -> None:
    labelled = [
        LabelledPhotograph(name=f"{n}", words=("dog",), subject=f"dog{n // 3}", collection="a")
        for n in range(9)
    ] + [
        LabelledPhotograph(name=f"h{n}", words=("hat",), subject=f"h{n}", collection="b")
        for n in range(9)
    ]
    folds = subject_folds(labelled)
    assert folds[:9] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert folds[9:] == [9, 8, 7, 6, 5, 4, 3, 2, 1]
    dealt = random_folds(labelled)
    assert len(set(dealt[:9])) == len(set(dealt[9:])) == 9


def test_a_word_with_one_subject_is_never_suggested_and_says_so() -> None:
    rng = np.random.default_rng(2)
    labelled = [
        LabelledPhotograph(
            name=f"{n}",
            words=(("clock",), ("dog",))[n % 2],
            subject="clock" if n % 2 == 0 else f"dog{n}",
            collection="a",
        )
        for n in range(24)
    ]
    features = rng.normal(size=(24, num_features(4))).astype(np.float32)
    features[::2] += 3
    progress = []
    head = fit_tagger(
        features, labelled, codec_id="ab" * 32, channels=4, provenance={},
        progress=lambda done, total: progress.append((done, total)),
    )  # fmt: skip
    clock, dog = head.words
    assert (clock.threshold, clock.subject_ap, clock.random_ap) == (None, None, 1.0)
    assert dog.subjects == 12
    assert progress[-1][0] == progress[-1][1] == len(progress)
    assert all(tag.tag != "clock" for row in features for tag in head.suggest(row))


def test_the_fit_does_not_learn_how_common_a_word_is() -> None:
    features = np.random.default_rng(3).normal(size=(20, num_features(4))).astype(np.float32)
    labels = np.zeros((20, 2), bool)
    labels[:3, 0], labels[:, 1] = True, True
    scores = fit_linear(features, labels, 4).scores(features.mean(0, keepdims=True))
    np.testing.assert_allclose(scores, 0, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 2), (70, 5)])
def test_features_of_any_size_are_finite_and_the_same_twice(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(4)
    symbols = rng.integers(-900, 900, (*shape, 72)).astype(np.int16)
    found = picture_features(symbols)
    assert found.shape == (num_features(72),)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, picture_features(symbols.copy()))
    np.testing.assert_array_equal(found, picture_features(-symbols))


def test_the_file_comes_back_and_is_the_same_each_time(
    codec: LayeredCodec, checkpoint: Path, photographs: Path
) -> None:
    data = (checkpoint / "tagger.safetensors").read_bytes()
    head = head_of(codec, checkpoint)
    assert head.to_bytes() == data
    again = train_tagger(
        [str(photographs)], [photographs / "labels.csv"], checkpoint=checkpoint, device="cpu"
    )
    assert again.head.words == head.words
    assert again.head.to_bytes() == data
    assert (again.labelled, again.unlabelled) == (16, 1)


def test_a_tagger_of_another_checkpoint_is_refused_but_stops_no_decoding(
    codec: LayeredCodec, checkpoint: Path, tmp_path: Path
) -> None:
    head = head_of(codec, checkpoint)
    other = TaggerHead(
        codec_id="cd" * 32, words=head.words, mean_F=head._mean_F, scale_F=head._scale_F,
        weights_FW=head._weights_FW, provenance={},
    )  # fmt: skip
    shutil.copytree(checkpoint, tmp_path / "c")
    (tmp_path / "c" / "tagger.safetensors").write_bytes(other.to_bytes())
    mismatched = load_codec(tmp_path / "c", device="cpu")
    stream = mismatched.encode([drawn("rows", 0)], tags=[()], exif_orientations=[1])
    assert mismatched.decode(stream)[0].shape == (64, 80, 3)
    assert isinstance(mismatched, TagSuggester)
    with pytest.raises(WeightsError, match="fitted to codec cdcd"):
        mismatched.suggest_tags(stream)


def test_damage_and_wrong_sizes_are_named(codec: LayeredCodec, checkpoint: Path) -> None:
    data = (checkpoint / "tagger.safetensors").read_bytes()
    for damaged in (b"", b"no tagger at all", data[:200], data[:-1]):
        with pytest.raises(WeightsError, match="damaged"):
            TaggerHead.from_bytes(damaged, codec_id=codec.codec_id, channels=72)
    with pytest.raises(WeightsError, match="features"):
        TaggerHead.from_bytes(data, codec_id=codec.codec_id, channels=71)


def test_a_checkpoint_without_a_tagger_says_how_to_get_one() -> None:
    plain = load_layered_codec(read_checkpoint(GOLDEN), device="cpu")
    with pytest.raises(WeightsError, match="train-tagger"):
        plain.encode_with_suggestions([drawn("rows", 0)], tags=[()], exif_orientations=[1])


def test_thresholds_are_respected(codec: LayeredCodec, checkpoint: Path) -> None:
    head = head_of(codec, checkpoint)
    features = codec.tag_features(drawn("rows", 3))
    (first, second) = head.probabilities(features)
    assert (first.tag, second.tag) == ("rows", "columns")
    assert first.score > 0.8
    assert second.score < 0.2
    for threshold, wanted in [
        (None, ()), (first.score, (first,)), (np.nextafter(first.score, 1), ()), (0.0, (first,)),
    ]:  # fmt: skip
        words = [
            dataclasses.replace(word, threshold=threshold if word.word == "rows" else None)
            for word in head.words
        ]
        head.words = tuple(words)
        assert head.suggest(features) == wanted


def test_a_stream_is_tagged_as_its_picture_was_and_a_picture_is_analysed_once(
    codec: LayeredCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    analyse = codec._analyse
    monkeypatch.setattr(codec, "_analyse", lambda image: calls.append(1) or analyse(image))
    images = [drawn("rows", 2), drawn("columns", 2)]
    tagged = codec.encode_with_suggestions(
        images, tags=[("own",), ("Columns",)], exif_orientations=[1, 1]
    )
    assert len(calls) == 2
    assert [tag.tag for tag in tagged[0].suggested] == ["rows"]
    assert tagged[1].suggested == (), "it has that tag already"
    streams = [one.stream for one in tagged]
    assert [parse_bitstream(data).tags for data in streams] == [("own", "rows"), ("Columns",)]
    assert codec.suggest_tags(streams)[0] == tagged[0].suggested
    assert [tag.tag for tag in codec.tag_probabilities(streams)[1]] == ["columns", "rows"]
    codec._verified.clear()
    assert codec.suggest_tags(streams)[0] == tagged[0].suggested, "from the bytes alone"
    plain = codec.encode(images[:1], tags=[("own", "rows")], exif_orientations=[1])
    assert plain[0] == streams[0]
    assert len(calls) == 3


def test_suggestions_give_way_to_own_tags() -> None:
    suggestions = (TagScore("dog", 0.9), TagScore("cat", 0.8))
    assert without_known(("Dog",), suggestions) == suggestions[1:]
    assert without_known([str(n) for n in range(255)], suggestions) == ()


def test_compress_puts_suggestions_beside_own_tags(checkpoint: Path, tmp_path: Path) -> None:
    sources = tmp_path / "in"
    sources.mkdir()
    for kind in ("columns", "rows"):
        Image.fromarray(drawn(kind, 4)).save(sources / f"{kind}.bmp")
    (sources / "rows.json").write_text(json.dumps({"cls": "drawing"}))
    common = ["--runtime", "local", "--tag-field", "cls", "--device", "cpu"]
    common += ["--checkpoint", str(checkpoint), "--min-psnr", "0", "--min-tile-psnr", "0"]
    for name, flags in [("with", ["--suggest-tags"]), ("without", [])]:
        command = ["compress", str(sources), str(tmp_path / name), *common, *flags]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    reader = ArchiveReader.open(str(tmp_path / "with"))
    columns, lines = (reader.get(key) for key in sorted(reader.keys()))
    assert columns.tags == ("columns",)
    assert 0.5 < columns.tag_scores[0] <= 1
    assert lines.tags == ("drawing", "rows")
    assert lines.tag_scores[0] == 1.0
    assert parse_bitstream(lines.base + lines.detail).tags == ("drawing", "rows")
    plain = {row.key: row for row in ArchiveReader.open(str(tmp_path / "without")).rows()}
    assert [plain[key].tags for key in sorted(plain)] == [(), ("drawing",)]
    assert all(row.tag_scores == () for row in plain.values())


def test_a_job_that_cannot_suggest_begins_nothing(tmp_path: Path, photographs: Path) -> None:
    command = ["compress", str(photographs), str(tmp_path / "a"), "--runtime", "local"]
    command += ["--suggest-tags", "--checkpoint", str(GOLDEN), "--device", "cpu"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "no tagger" in result.output
    assert not (tmp_path / "a").exists()


def test_the_plan_knows_the_tagger_only_where_it_matters(checkpoint: Path) -> None:
    assert "suggest_tags" not in EncodePolicy().to_dict()
    policy = EncodePolicy(suggest_tags=True)
    assert EncodePolicy.from_dict(policy.to_dict()) == policy
    assert len(Checkpoint.open(checkpoint).tagger_sha256()) == 64
    assert not isinstance(FakeCodec(), TagSuggester)


def test_the_program_prints_tags_of_pictures(checkpoint: Path, photographs: Path) -> None:
    base = ["tag", "--checkpoint", str(checkpoint), "--device", "cpu"]
    picture = photographs / "rows4.png"
    result = CliRunner().invoke(app, [*base, str(picture)])
    assert result.exit_code == 0, result.output
    path, tag, score = result.stdout.strip().split("\t")
    assert (path, tag) == (str(picture), "rows")
    assert 0.5 < float(score) <= 1
    every = CliRunner().invoke(app, [*base, "--all", str(picture)])
    assert len(every.stdout.splitlines()) == 2
    broken = CliRunner().invoke(app, [*base, str(photographs / "broken.jpg"), str(picture)])
    assert broken.exit_code == 1
    assert broken.stdout == result.stdout


def test_labels_become_words_and_subjects(tmp_path: Path) -> None:
    assert words_of_label("T-Shirt") == ("t-shirt",)
    assert words_of_label("dog2") == ("dog",)
    assert words_of_label("shiny_sneaker") == ("sneaker", "shoes")
    path = tmp_path / "labels.csv"
    path.write_text("file,label,size\na.jpg,dog2,3\nb.jpg,dog2,3\nc.jpg,Hat,3\nd.jpg,Hat,3\n")
    subjects = [photograph.subject for photograph in read_labelled([path]).values()]
    assert subjects == ["dog2", "dog2", "c.jpg", "d.jpg"]
    with pytest.raises(SourceFormatError, match=r"a\.jpg has a label already"):
        read_labelled([path, path])
    path.write_text("name,label\na.jpg,dog\n")
    with pytest.raises(SourceFormatError, match="without `file` or `label`"):
        read_labelled([path])


def test_a_label_without_its_photograph_is_named(photographs: Path, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("file,label\nrows0.png,rows\nnowhere.png,columns\n")
    with pytest.raises(SourceFormatError, match=r"1 photographs are not .* nowhere\.png"):
        train_tagger([str(photographs)], [path], checkpoint=GOLDEN, device="cpu")
