"""Zero-shot taggers on tiny random models: the scores, the cache, the order, and what goes wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from dicmh_ray.cli import app
from dicmh_ray.codec import zero_shot
from dicmh_ray.codec.image_taggers import TaggerSpec, load_image_tagger, model_sha256
from dicmh_ray.codec.zero_shot import ZeroShotTagger, cache_folder
from dicmh_ray.errors import TaggerError
from dicmh_ray.tags import Vocabulary
from tests.codec.second_device import second_device
from tests.codec.tiny_models import WORDS, write_clip, write_siglip

VOCABULARY = Vocabulary(WORDS)
KINDS = ("clip", "siglip")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"clip": write_clip(folder), "siglip": write_siglip(folder)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    sizes = [(40, 60), (60, 40), (32, 32), (7, 9), (1, 2000)]
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def tagger_of(model: Path, **options) -> ZeroShotTagger:
    return ZeroShotTagger(model, options.pop("vocabulary", VOCABULARY), device="cpu", **options)


def embeddings_computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    calls: list[tuple[str, ...]] = []
    embed = ZeroShotTagger._embed_words
    monkeypatch.setattr(
        ZeroShotTagger,
        "_embed_words",
        lambda self, prompts: calls.append(prompts) or embed(self, prompts),
    )
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_model_itself(models, cache, images, kind: str) -> None:
    """The model's own forward pass on one picture and all texts."""
    directory = models[kind]
    found = tagger_of(directory).scores(images[:1])[0]
    model = AutoModel.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    prompt = zero_shot.DEFAULT_PROMPTS[kind][0]
    inputs = processor(
        images=Image.fromarray(images[0]),
        text=[prompt.replace("{}", word).lower() for word in WORDS],
        padding="max_length" if kind == "siglip" else True,
        max_length=model.config.text_config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image[0]
    wanted = logits.softmax(0) if kind == "clip" else logits.sigmoid()
    np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_pictures_alone_in_order(models, cache, images, kind, monkeypatch) -> None:
    tagger = tagger_of(models[kind], threshold=0.0)
    monkeypatch.setattr(zero_shot, "IMAGE_BATCH", 2)
    together = tagger.scores(images)
    assert together.shape == (len(images), len(WORDS))
    assert together.dtype == np.float32
    assert ((together >= 0) & (together <= 1)).all()
    assert len({row.tobytes() for row in together}) == len(images)
    for image, row in zip(images, together, strict=True):
        np.testing.assert_allclose(tagger.scores([image])[0], row, atol=1e-5)
    for row, tags in zip(together, tagger.tag(images), strict=True):
        assert [tag.tag for tag in tags] == [WORDS[i] for i in np.argsort(-row)]
    assert tagger.tag([]) == []
    assert tagger.scores([]).shape == (0, len(WORDS))


def test_shares_of_clip_sum_to_one_and_those_of_siglip_need_not(models, cache, images) -> None:
    np.testing.assert_allclose(tagger_of(models["clip"]).scores(images).sum(1), 1, atol=1e-5)
    few = Vocabulary(WORDS[:3])
    probabilities = tagger_of(models["siglip"]).scores(images)[:, :3]
    alone = tagger_of(models["siglip"], vocabulary=few).scores(images)
    np.testing.assert_allclose(alone, probabilities, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_threshold_and_limit_choose_among_the_scores(models, cache, images, kind: str) -> None:
    scores = tagger_of(models[kind]).scores(images)
    middle = float(np.median(scores))
    found = tagger_of(models[kind], threshold=middle, top_k=2).tag(images)
    for row, tags in zip(scores, found, strict=True):
        assert len(tags) == min(2, int((row >= middle).sum()))
        assert all(tag.score >= middle for tag in tags)


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_embedded_once_for_model_vocabulary_and_prompts(
    models, cache, images, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = embeddings_computed(monkeypatch)
    first = tagger_of(models[kind]).scores(images)
    assert len(calls) == 1
    np.testing.assert_array_equal(tagger_of(models[kind]).scores(images), first)
    assert len(calls) == 1, "from the cache"
    tagger_of(models[kind], prompts=("{}",))
    tagger_of(models[kind], vocabulary=Vocabulary(reversed(WORDS)))
    assert len(calls) == 3
    moved = shutil.copytree(models[kind], tmp_path / "moved")
    tagger_of(moved)
    assert len(calls) == 3, "the same files elsewhere"
    facts = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(facts | {"note": "another"}))
    tagger_of(moved)
    assert len(calls) == 4
    assert len(list(cache.iterdir())) == 4


def test_a_damaged_cache_is_computed_again(models, cache, images, monkeypatch) -> None:
    calls = embeddings_computed(monkeypatch)
    wanted = tagger_of(models["clip"]).scores(images)
    (path,) = cache.iterdir()
    sound = path.read_bytes()
    nothing = np.full((len(WORDS), 16), np.nan, np.float32)
    np.save(cache / "nan.npy", nothing)
    for content in (b"", b"no array", sound[:-3], (cache / "nan.npy").read_bytes()):
        path.write_bytes(content)
        np.testing.assert_array_equal(tagger_of(models["clip"]).scores(images), wanted)
        assert path.read_bytes() == sound
    assert len(calls) == 5


def test_a_cache_that_cannot_be_written_costs_only_time(models, tmp_path, images) -> None:
    (tmp_path / "file").write_text("in the way")
    tagger = tagger_of(models["clip"], cache=tmp_path / "file" / "below")
    assert tagger.scores(images).shape == (len(images), len(WORDS))


def test_several_prompts_are_averaged(models, cache, images) -> None:
    prompts = ("a photo of a {}.", "a drawing of a {}.")
    one, other, both = (
        tagger_of(models["clip"], prompts=used)._text_WD
        for used in (prompts[:1], prompts[1:], prompts)
    )
    mean = one + other
    torch.testing.assert_close(both, mean / mean.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)


def test_a_description_loads_the_model_it_was_made_of_and_no_other(models, cache, tmp_path) -> None:
    spec = TaggerSpec.parse(f"siglip:{models['siglip']}", vocabulary=WORDS, top_k=3).pinned()
    tagger = load_image_tagger(spec, device="cpu")
    assert isinstance(tagger, ZeroShotTagger)
    assert tagger.kind == "siglip"
    assert spec.sha256 == tagger.model_sha256 == model_sha256(models["siglip"])
    copy = shutil.copytree(models["siglip"], tmp_path / "copy")
    (copy / "further.txt").write_text("another file")
    moved = TaggerSpec(kind="siglip", target=str(copy), vocabulary=WORDS, sha256=spec.sha256)
    with pytest.raises(TaggerError, match="its files have SHA-256"):
        load_image_tagger(moved, device="cpu")


def test_a_model_of_another_kind_is_refused(models, cache, tmp_path: Path) -> None:
    with pytest.raises(TaggerError, match="model type is 'clip', wanted siglip"):
        tagger_of(models["clip"], kind="siglip")
    copy = shutil.copytree(models["clip"], tmp_path / "copy")
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(TaggerError, match="model type is 'bert', wanted clip or siglip"):
        tagger_of(copy)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", b"{", "config.json is no model's"),
        ("model.safetensors", None, "never unpickled"),
        ("model.safetensors", b"damaged", "cannot be loaded"),
        ("tokenizer.json", b"{}", "cannot be loaded"),
        ("processor_config.json", None, "cannot be loaded"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(
    models, cache, tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    copy = shutil.copytree(models["clip"], tmp_path / "copy")
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(TaggerError, match=reason):
        tagger_of(copy)


def test_missing_weights_are_an_error_and_never_random(models, cache, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(models["clip"], tmp_path / "copy")
    state = load_file(copy / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(TaggerError, match=r"1 weights are missing: visual_projection\.weight"):
        tagger_of(copy)


def test_what_is_neither_here_nor_downloaded_is_told(cache, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TaggerError, match="hf download nobody/nothing-at-all"):
        tagger_of(Path("nobody/nothing-at-all"))
    with pytest.raises(TaggerError, match="no such directory"):
        tagger_of(tmp_path / "nothing")


def test_a_picture_of_another_form_is_an_error_of_its_own(models, cache) -> None:
    with pytest.raises(ValueError, match="wanted uint8"):
        tagger_of(models["clip"]).tag([np.zeros((4, 4), np.uint8)])


def test_the_program_tags_by_a_model_and_a_vocabulary(models, cache, images, tmp_path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\n".join(WORDS))
    pictures = []
    for n, image in enumerate(images[:2]):
        pictures.append(str(tmp_path / f"{n}.png"))
        Image.fromarray(image).save(pictures[-1])
    base = ["tag", *pictures, "--tagger", f"siglip:{models['siglip']}", "--device", "cpu"]
    result = CliRunner().invoke(app, [*base, "--vocabulary", str(words), "--all", "--json"])
    assert result.exit_code == 0, result.output
    wanted = tagger_of(models["siglip"], threshold=0.0).tag(images[:2])
    for line, picture, tags in zip(result.stdout.splitlines(), pictures, wanted, strict=True):
        found = json.loads(line)
        assert found["file"] == picture
        assert [tag["tag"] for tag in found["tags"]] == [tag.tag for tag in tags]
        assert found["tags"][0]["score"] == pytest.approx(tags[0].score, abs=1e-5)
    result = CliRunner().invoke(app, base)
    assert result.exit_code == 2
    assert "--vocabulary FILE" in result.output


@pytest.mark.parametrize("kind", KINDS)
def test_scores_on_another_device_are_the_cpus(models, cache, images, kind: str) -> None:
    with second_device():
        found = ZeroShotTagger(models[kind], VOCABULARY, device="cuda").scores(images)
    shutil.rmtree(cache)  # the texts' embeddings: this time they are the CPU's own
    np.testing.assert_array_equal(found, tagger_of(models[kind]).scores(images))
