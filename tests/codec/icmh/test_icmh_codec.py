"""The Diff-ICMH codec on a tiny checkpoint of random networks: every size, every view, every fault."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from dicmh_ray import compress, open_archive
from dicmh_ray.archive import verify_archive
from dicmh_ray.bitstream import Header, State, parse_bitstream, prefix_bytes, write_bitstream
from dicmh_ray.codec import load_codec, read_checkpoint
from dicmh_ray.codec.checkpoint import DIFF_ICMH, IDENTITY_FILES
from dicmh_ray.codec.icmh import icmh_codec
from dicmh_ray.codec.icmh.icmh_codec import IcmhCodec
from dicmh_ray.codec.icmh.parts import HUMAN_FILES, NORMALS
from dicmh_ray.errors import (
    BitstreamError,
    CodecMismatchError,
    EncodeError,
    InvalidHeaderError,
    SymbolError,
    ViewError,
    WeightsError,
)
from dicmh_ray.pipeline import EncodePolicy
from tests.codec.icmh.tiny_codec import TINY, photograph, write_tiny_checkpoint
from tests.small_collections import bmp, write_tar


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def load(folder: Path) -> IcmhCodec:
    codec = load_codec(folder, device="cpu")
    assert isinstance(codec, IcmhCodec)
    return codec


@pytest.fixture(scope="module")
def codec(tiny_checkpoint: Path) -> IcmhCodec:
    return load(tiny_checkpoint)


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The checkpoint, to be spoilt."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture(scope="module")
def machine_only(tmp_path_factory: pytest.TempPathFactory) -> IcmhCodec:
    """Other weights, no vocabulary, no human view."""
    folder = tmp_path_factory.mktemp("machine")
    write_tiny_checkpoint(folder, seed=1, has_human_view=False, words=())
    return load(folder)


def encode(codec: IcmhCodec, image: np.ndarray, *tags: str) -> bytes:
    return codec.encode([image], tags=[tags], exif_orientations=[1])[0]


def test_the_checkpoint_says_which_codec_it_is(codec: IcmhCodec, tiny_checkpoint: Path) -> None:
    assert codec.codec_id == read_checkpoint(tiny_checkpoint).codec_id
    assert codec.num_states == 1
    assert codec.latent_channels == TINY.latent_coder.y_channels
    assert codec.views == ("machine", "human")


@pytest.mark.parametrize("size", [(1, 1), (63, 65), (130, 70)])
def test_any_size_comes_back_at_its_size(codec: IcmhCodec, size: tuple[int, int]) -> None:
    image = photograph(*size)
    data = codec.encode([image], tags=[("a tag",)], exif_orientations=[6])[0]
    header = parse_bitstream(data).header
    assert (header.height, header.width, header.exif_orientation) == (*size, 6)
    for view in codec.views:
        decoded = codec.decode([data], view=view)[0]
        assert decoded.shape == (*size, 3)
        assert decoded.dtype == np.uint8
    (latent,) = codec.decode_latent([data])
    assert latent.dtype == np.float16
    assert latent.shape == (codec.latent_channels, *(4 * -(-side // 64) for side in size))
    assert np.unique(latent).size > 3, "networks under which there is something to code"


def test_pictures_that_differ_have_streams_and_views_that_differ(codec: IcmhCodec) -> None:
    streams = [encode(codec, photograph(64, 64, seed)) for seed in range(2)]
    assert streams[0] != streams[1]
    one, other = codec.decode(streams)
    assert (one != other).any()


def test_grey_stays_grey(codec: IcmhCodec) -> None:
    image = np.repeat(photograph(40, 40)[:, :, :1], 3, 2)
    data = encode(codec, image)
    for view in codec.views:
        decoded = codec.decode([data], view=view)[0]
        assert (decoded == decoded[:, :, :1]).all()


def test_encoding_is_the_same_again_and_in_a_batch(codec: IcmhCodec) -> None:
    images = [photograph(33, 20), photograph(64, 96, 1), photograph(33, 20, 2)]
    alone = [encode(codec, image, "dog") for image in images]
    assert [encode(codec, image, "dog") for image in images] == alone
    assert codec.encode(images, tags=[("dog",)] * 3, exif_orientations=[1] * 3) == alone


def test_decoding_right_after_encoding_gives_what_a_fresh_decoder_gives(
    codec: IcmhCodec, tiny_checkpoint: Path
) -> None:
    data = encode(codec, photograph(70, 140))
    fresh = load(tiny_checkpoint)
    np.testing.assert_array_equal(codec.decode_latent([data])[0], fresh.decode_latent([data])[0])
    np.testing.assert_array_equal(codec.decode([data])[0], fresh.decode([data])[0])


def test_tiles_are_joined_to_the_latents_that_were_encoded(
    codec: IcmhCodec, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photograph(200, 330)
    whole = encode(codec, image)
    (in_one,) = codec.decode_latent([whole])
    monkeypatch.setattr(icmh_codec, "TILE", 2)
    data = encode(codec, image)
    assert data != whole, "four hyper cells by six are six tiles"
    (latent,) = codec.decode_latent([data])
    np.testing.assert_array_equal(load(tiny_checkpoint).decode_latent([data])[0], latent)
    # The context ends at a tile, so means and therefore remainders are others: within a step.
    assert np.abs(latent - in_one).max() <= 1
    monkeypatch.undo()
    with pytest.raises(SymbolError):
        load(tiny_checkpoint).decode([data])


def test_windows_give_the_picture_of_one_pass(
    codec: IcmhCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photograph(100, 64 * 17)
    data = encode(codec, image)
    _, latents = codec._decode_latents(data, None)
    analysed, view = codec._analyse(image), codec.decode([data])[0]
    with torch.inference_mode():
        estimate = codec._estimate(latents)
    monkeypatch.setattr(icmh_codec, "WINDOW", 3)
    with torch.inference_mode():
        np.testing.assert_allclose(codec._estimate(latents), estimate, atol=1e-4)
    assert np.abs(codec.decode([data])[0].astype(int) - view).max() <= 1
    # The margin of the encoder saves work: beyond it only the hyper latent, and so the rate, changes.
    np.testing.assert_allclose(codec._analyse(image).y_MIJ, analysed.y_MIJ, atol=1e-4)
    monkeypatch.setattr(icmh_codec, "ENCODE_MARGIN", 6)
    np.testing.assert_allclose(codec._analyse(image).z_NKL, analysed.z_NKL, atol=1e-4)


def test_a_human_view_is_the_same_in_a_batch_again_and_after_other_work(
    codec: IcmhCodec,
) -> None:
    streams = [encode(codec, photograph(40, 66, seed), "dog") for seed in range(2)]
    batch = codec.decode(streams, view="human")
    torch.manual_seed(99)
    torch.randn(10)
    for data, together in zip(streams, batch, strict=True):
        np.testing.assert_array_equal(codec.decode([data], view="human")[0], together)
        assert (codec.decode([data])[0] != together).any()


def test_tags_guide_the_human_view_and_not_the_machine_view(codec: IcmhCodec) -> None:
    image = photograph(48, 48)
    streams = [encode(codec, image, *tags) for tags in ((), ("dog",), ("cat",))]
    plain, dog, cat = codec.decode(streams, view="human")
    assert (dog != plain).any()
    assert (dog != cat).any()
    machine = codec.decode(streams)
    np.testing.assert_array_equal(machine[0], machine[1])


def test_noise_belongs_to_the_payload_and_not_to_the_frame(codec: IcmhCodec) -> None:
    image = photograph(48, 48)
    one, other = codec.encode([image] * 2, tags=[("dog",)] * 2, exif_orientations=[1, 6])
    assert one != other
    views = codec.decode([one, other], view="human")
    np.testing.assert_array_equal(views[0], views[1])


def test_a_checkpoint_without_a_restorer_has_the_machine_view_alone(
    machine_only: IcmhCodec,
) -> None:
    assert machine_only.views == ("machine",)
    data = encode(machine_only, photograph(20, 20), "a tag")
    assert machine_only.decode([data])[0].shape == (20, 20, 3)
    with pytest.raises(ViewError, match="offers machine"):
        machine_only.decode([data], view="human")


@pytest.mark.parametrize("name", HUMAN_FILES)
def test_a_checkpoint_with_half_a_human_view_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(WeightsError, match=name):
        load(copy)


def test_tags_come_back_from_the_vocabulary_and_as_free_text(codec: IcmhCodec) -> None:
    image = photograph(20, 20)
    assert codec._vocabulary is not None
    tags = {}
    for given in ((), ("tree", "cat"), ("a red bicycle",), ("zoo", "dog")):
        data = encode(codec, image, *given)
        assert len(prefix_bytes(data)) == 1, "needs no vocabulary"
        assert prefix_bytes(data) == (len(data),)
        tags[given] = parse_bitstream(data, vocabulary=codec._vocabulary).tags
    assert tags == {
        (): (),
        ("tree", "cat"): ("cat", "tree"),
        ("a red bicycle",): ("a red bicycle",),
        ("zoo", "dog"): ("dog", "zoo"),
    }
    with pytest.raises(InvalidHeaderError, match="vocabulary"):
        parse_bitstream(encode(codec, image, "dog"))


@pytest.mark.parametrize("tags", [(), ("dog",), ("free text",)])
def test_a_stream_of_another_checkpoint_is_refused_by_name(
    codec: IcmhCodec, machine_only: IcmhCodec, tags: tuple[str, ...]
) -> None:
    data = encode(codec, photograph(20, 20), *tags)
    with pytest.raises(CodecMismatchError):
        machine_only.decode([data])
    with pytest.raises(CodecMismatchError):
        machine_only.decode_latent([data])


def test_damage_that_every_checksum_of_the_frame_misses_is_told(
    codec: IcmhCodec, tiny_checkpoint: Path
) -> None:
    """Any payload, framed as an encoder would: an error of its family, never a wrong picture."""
    image = photograph(130, 70)
    stream = parse_bitstream(encode(codec, image))
    payload, crc = stream.states[0].payload, stream.states[0].symbol_crc
    rng = np.random.default_rng(0)
    damaged = [b"", payload[:1], payload[:-1], payload[:-4], payload + b"\0", payload + b"\xff" * 8]
    damaged += [rng.bytes(len(payload)), b"\xff" * len(payload), bytes(len(payload))]
    for position in range(0, len(payload), max(1, len(payload) // 12)):
        changed = bytearray(payload)
        changed[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(changed))
    fresh = load(tiny_checkpoint)
    header = Header(codec_id=codec.codec_id, width=70, height=130, num_states=1)
    for found in damaged:
        with pytest.raises(BitstreamError):
            fresh.decode([write_bitstream(header, (), [State(found, crc)])])
    with pytest.raises(SymbolError, match="checksum"):
        fresh.decode([write_bitstream(header, (), [State(payload, crc ^ 1)])])


def test_a_small_payload_of_a_gigantic_picture_is_told_before_memory_is_taken(
    codec: IcmhCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(np, "empty", refuse)
    header = Header(codec_id=codec.codec_id, width=16_384, height=16_384, num_states=1)
    with pytest.raises(SymbolError):
        codec.decode([write_bitstream(header, (), [State(b"x" * 40, 0)])])


def test_another_number_of_states_is_refused(codec: IcmhCodec) -> None:
    header = Header(codec_id=codec.codec_id, width=20, height=20, num_states=2)
    with pytest.raises(InvalidHeaderError, match="state count"):
        codec.decode([write_bitstream(header, (), [State(b"", 0)])])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_is_refused(
    codec: IcmhCodec, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 18, x.shape[2] // 8, x.shape[3] // 8), value)

    monkeypatch.setattr(codec._parts.vae, "encode", broken)
    with pytest.raises(EncodeError, match="not finite"):
        encode(codec, photograph(32, 32))


def spoil(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Write a safetensors file again with its arrays changed."""
    arrays = {name: array.copy() for name, array in safetensors.numpy.load_file(path).items()}
    change(arrays)
    path.write_bytes(safetensors.numpy.save(arrays))


def draw_human_view(folder: Path) -> None:
    """Make a codec read all its files."""
    codec = load(folder)
    codec.decode([encode(codec, photograph(8, 8))], view="human")


def put_nan(arrays: dict[str, np.ndarray]) -> None:
    next(a for a in arrays.values() if a.dtype.kind == "f" and a.size).flat[0] = np.nan


@pytest.mark.parametrize("name", ["latent_coder", "vae", "unet", "control", "text"])
def test_weights_that_are_not_finite_are_refused(copy: Path, name: str) -> None:
    spoil(copy / f"{name}.safetensors", put_nan)
    with pytest.raises(WeightsError, match=f"{name}.safetensors: .* is not finite"):
        draw_human_view(copy)


@pytest.mark.parametrize("name", ["latent_coder", "vae", "unet", "control", "text"])
def test_a_tensor_more_or_less_is_refused(copy: Path, name: str) -> None:
    def rename(arrays: dict[str, np.ndarray]) -> None:
        arrays["another"] = arrays.pop(next(iter(arrays)))

    spoil(copy / f"{name}.safetensors", rename)
    with pytest.raises(WeightsError, match="another"):
        draw_human_view(copy)


def test_tables_of_another_codec_are_refused(copy: Path) -> None:
    tables = copy / "tables.safetensors"
    sound = tables.read_bytes()
    spoil(tables, lambda arrays: arrays.pop(NORMALS))
    with pytest.raises(WeightsError, match=NORMALS):
        load(copy)
    tables.write_bytes(sound[:-100])
    with pytest.raises(WeightsError, match="tables"):
        load(copy)
    tables.write_bytes(sound)
    config = json.loads((copy / "config.json").read_text())
    config["network"]["latent_coder"] |= {"y_channels": 14, "slices": [2, 4, 8]}
    other = write_tiny_checkpoint(
        copy.parent / "wider", config=type(TINY).from_dict(config["network"]), has_human_view=False
    )
    tables.write_bytes(other.files["tables.safetensors"])
    with pytest.raises(WeightsError, match="tables"):
        load(copy)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("vae", {"kind": "jpeg"}),
        ("vae", {"settings": {"num_luma": 12}}),
        ("latent_coder", {"z_channels": "many"}),
        ("latent_coder", {"slices": [2, 4]}),
        ("sampler", {"kind": "guess"}),
        ("sampler", {"steps": 0}),
        ("restorer", {"unknown": 1}),
    ],
)
def test_shapes_that_make_no_codec_are_refused(
    copy: Path, part: str, change: dict[str, object]
) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["network"][part] |= change
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError):
        load(copy)


@pytest.mark.parametrize("name", IDENTITY_FILES[DIFF_ICMH])
def test_the_identity_covers_every_file_that_changes_what_a_stream_means(
    copy: Path, name: str
) -> None:
    before = read_checkpoint(copy).codec_id
    (copy / "LICENSE").write_text("travels along")
    assert read_checkpoint(copy).codec_id == before
    if name == "config.json":
        config = json.loads((copy / name).read_text())
        config["network"]["sampler"]["steps"] += 1
        (copy / name).write_text(json.dumps(config))
    else:
        content = bytearray((copy / name).read_bytes())
        content[-2] ^= 1
        (copy / name).write_bytes(content)
    assert read_checkpoint(copy).codec_id != before


def test_the_files_of_a_checkpoint_travel_with_their_content(tiny_checkpoint: Path) -> None:
    files = read_checkpoint(tiny_checkpoint).files
    assert pickle.loads(pickle.dumps(files)) == dict(files)


def test_an_archive_carries_the_codec_that_opens_it(
    codec: IcmhCodec, copy: Path, tmp_path: Path
) -> None:
    images = {f"{n}": photograph(40 + 30 * n, 70, n) for n in range(3)}
    tar = write_tar(
        tmp_path / "three.tar",
        {key: bmp(image) for key, image in images.items()},
        metadata={"1": {"cls": "dog"}},
    )
    archive = str(tmp_path / "archive")
    policy = EncodePolicy(min_psnr=0, min_worst_tile_psnr=0)
    report = compress([tar], archive, codec=copy, policy=policy, runtime="local")
    assert report.tally.images == 3
    shutil.rmtree(copy)  # the archive has its own
    opened = open_archive(archive, device="cpu")
    assert opened.codec_id == codec.codec_id
    assert {view.status for view in opened} == {"ok"}
    for view in opened:
        image = images[view.key.rpartition("/")[2]]
        data = encode(codec, image, *view.tags)
        np.testing.assert_array_equal(view.pixels(), codec.decode([data])[0])
        np.testing.assert_array_equal(
            view.pixels(view="human"), codec.decode([data], view="human")[0]
        )
    found = verify_archive(archive, decode=opened.codec.decode_latent)
    assert (found.problems, found.unchecked, found.rows) == ([], None, 3)
