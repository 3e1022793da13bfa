"""The default codec on the tiny checkpoint: every size, every state, no surprises."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from threadpoolctl import threadpool_info, threadpool_limits
from torch.utils.data import DataLoader, Dataset

from dicmh_ray.bitstream import Header, State, parse_bitstream, prefix_bytes, write_bitstream
from dicmh_ray.codec import export, layered_codec, load_codec, read_checkpoint, reference_decoder
from dicmh_ray.codec.layered_codec import LayeredCodec
from dicmh_ray.codec.network import CodecNetwork, NetworkConfig
from dicmh_ray.codec.symbols import as_rounded
from dicmh_ray.codec.tables import ContextTables
from dicmh_ray.errors import (
    BitstreamError,
    CodecMismatchError,
    DeviceError,
    EncodeError,
    SymbolError,
    WeightsError,
)
from tests.golden.make_golden import CHECKPOINTS, digest

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def codec() -> LayeredCodec:
    loaded = load_codec(GOLDEN / "checkpoint", device="cpu")
    assert isinstance(loaded, LayeredCodec)
    return loaded


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth colour field with edges and some noise, uint8 ``[H, W, 3]``."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 1.7 + seed, y * 1.3, 90 + 60 * np.sin((x + y) / 17)], -1) % 256
    base[(x // 23 + y // 19) % 5 == 0] *= 0.4
    return (base + rng.normal(0, 4, base.shape)).clip(0, 255).astype(np.uint8)


def encode(codec: LayeredCodec, image: np.ndarray) -> bytes:
    return codec.encode([image], tags=[("a tag",)], exif_orientations=[6])[0]


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 40), (15, 16), (17, 33), (64, 48), (1040, 24), (30, 1100)]
)
def test_any_size_comes_back_at_its_size(codec: LayeredCodec, size: tuple[int, int]) -> None:
    image = picture(*size)
    data = encode(codec, image)
    stream = parse_bitstream(data)
    assert (stream.header.height, stream.header.width) == size
    assert stream.header.exif_orientation == 6
    assert stream.tags == ("a tag",)
    decoded = codec.decode([data])[0]
    assert decoded.shape == (*size, 3)
    assert decoded.dtype == np.uint8
    assert codec.measure([image], [decoded])[0].psnr > 18


def test_a_prefix_is_what_encoding_fewer_states_would_give(codec: LayeredCodec) -> None:
    data = encode(codec, picture(70, 50))
    ends = prefix_bytes(data)
    for count, end in enumerate(ends, 1):
        whole = codec.decode([data], states=count)[0]
        np.testing.assert_array_equal(codec.decode([data[:end]])[0], whole)
        np.testing.assert_array_equal(
            codec.decode_latent([data[:end]])[0], codec.decode_latent([data], states=count)[0]
        )


def test_decoding_right_after_encoding_gives_what_a_fresh_decoder_gives(
    codec: LayeredCodec,
) -> None:
    data = encode(codec, picture(70, 50))
    fresh = load_codec(GOLDEN / "checkpoint", device="cpu")
    for count, end in enumerate(prefix_bytes(data), 1):
        np.testing.assert_array_equal(codec.decode([data[:end]])[0], fresh.decode([data[:end]])[0])
        np.testing.assert_array_equal(
            codec.decode([data], states=count)[0], fresh.decode([data], states=count)[0]
        )


def test_more_states_are_closer_to_the_source(codec: LayeredCodec) -> None:
    image = picture(96, 96)
    data = encode(codec, image)
    scores = [codec.measure([image], codec.decode([data], states=k))[0].psnr for k in (1, 2, 3)]
    assert scores == sorted(scores)


def test_grey_stays_grey(codec: LayeredCodec) -> None:
    image = np.repeat(picture(40, 40)[:, :, :1], 3, 2)
    decoded = codec.decode([encode(codec, image)])[0]
    assert (decoded == decoded[:, :, :1]).all()


def test_windows_give_the_picture_of_one_pass(
    codec: LayeredCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(400, 330)
    data = encode(codec, image)
    whole = codec.decode([data])[0]
    monkeypatch.setattr(layered_codec, "WINDOW", 8)
    windowed = codec.decode([data])[0]
    assert np.abs(whole.astype(int) - windowed).max() <= 1
    again = encode(codec, image)
    difference = codec._decode_symbols(data, None)[1] != codec._decode_symbols(again, None)[1]
    assert difference.mean() < 1e-4


@pytest.mark.parametrize("size", [(48, 64), (33, 250), (7, 5)])
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_reduced_picture_is_the_means_of_the_whole_one(
    codec: LayeredCodec, size: tuple[int, int], reduction: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layered_codec, "WINDOW", 2)
    image = (64 + picture(*size) // 2).astype(np.uint8)
    data = encode(codec, image)
    (small,) = codec.decode_reduced([data], [reduction], states=2)
    (whole,) = codec.decode([data], states=2)
    assert (small.dtype, small.shape[2]) == (np.uint8, 3)
    assert small.shape[:2] == tuple(-(-side // reduction) for side in size)
    rows, columns = (side // reduction for side in size)
    blocks = whole[: rows * reduction, : columns * reduction]
    means = blocks.reshape(rows, reduction, columns, reduction, 3).mean((1, 3))
    # Half a level of rounding each; the whole one is also clipped before the mean.
    assert np.abs(small[:rows, :columns] - means).max(initial=0) <= 1


def test_a_reduced_grey_picture_is_grey(codec: LayeredCodec) -> None:
    grey = np.repeat(picture(40, 40)[..., :1], 3, axis=2)
    (small,) = codec.decode_reduced([encode(codec, grey)], [4])
    assert small.shape == (10, 10, 3)
    assert (small == small[..., :1]).all()


def test_images_of_a_batch_are_coded_as_alone(codec: LayeredCodec) -> None:
    images = [picture(33, 20), picture(64, 64, 1), picture(33, 20, 2)]
    together = codec.encode(images, tags=[()] * 3, exif_orientations=[1] * 3)
    alone = [codec.encode([i], tags=[()], exif_orientations=[1])[0] for i in images]
    assert together == alone


SETTINGS = ("two threads", "one thread", "no mkldnn", "bf16 autocast", "NCHW", "float64 default")


@pytest.mark.parametrize("writer", SETTINGS)
def test_streams_decode_to_the_same_symbols_under_every_setting(
    codec: LayeredCodec, writer: str
) -> None:
    image = picture(90, 120, seed=len(writer))
    data = under(codec, writer, lambda: encode(codec, image))
    symbols = [
        under(codec, reader, lambda: codec._decode_symbols(data, None)[1]) for reader in SETTINGS
    ]
    for found in symbols[1:]:
        np.testing.assert_array_equal(symbols[0], found)


def under(codec: LayeredCodec, setting: str, action: Callable[[], Any]) -> Any:
    """Run an action under a torch setting, and restore it."""
    threads = torch.get_num_threads()
    layout = torch.contiguous_format if setting == "NCHW" else torch.channels_last
    codec._network.to(memory_format=layout)
    try:
        if setting in ("one thread", "two threads"):
            torch.set_num_threads(1 if setting == "one thread" else 2)
        if setting == "float64 default":
            torch.set_default_dtype(torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of TF32 whenever these flags are set
            with (
                torch.backends.mkldnn.flags(enabled=setting != "no mkldnn"),
                torch.autocast("cpu", torch.bfloat16, enabled=setting == "bf16 autocast"),
            ):
                return action()
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(torch.float32)
        codec._network.to(memory_format=torch.channels_last)


def test_a_stream_of_another_checkpoint_is_refused(codec: LayeredCodec) -> None:
    data = bytearray(encode(codec, picture(20, 20)))
    data[6] ^= 1
    with pytest.raises(BitstreamError):
        codec.decode([bytes(data)])
    other = LayeredCodec.__new__(LayeredCodec)
    other.__dict__.update(codec.__dict__, codec_id="00" * 32, _verified=[])
    with pytest.raises(CodecMismatchError):
        other.decode([encode(codec, picture(20, 20))])


def test_forged_checksums_end_in_a_symbol_error(codec: LayeredCodec) -> None:
    stream = parse_bitstream(encode(codec, picture(40, 40)))
    header = Header(codec_id=codec.codec_id, width=40, height=40, num_states=3)
    payload = bytearray(stream.states[0].payload)
    payload[5] ^= 4
    forged = write_bitstream(header, (), [State(bytes(payload), stream.states[0].symbol_crc)])
    with pytest.raises(SymbolError):
        codec.decode([forged])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_is_refused(
    codec: LayeredCodec, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        return torch.full((1, codec.latent_channels, 2, 2), value)

    monkeypatch.setattr(codec._network, "encode", broken)
    with pytest.raises(EncodeError, match="not finite"):
        encode(codec, picture(32, 32))


@pytest.mark.parametrize("folder", CHECKPOINTS)
def test_golden_streams_decode_to_their_symbols_and_pixels(folder: str) -> None:
    codec = load_codec(GOLDEN / CHECKPOINTS[folder], device="cpu")
    assert isinstance(codec, LayeredCodec)
    expected = json.loads((GOLDEN / folder / "expected.json").read_text())
    assert len(expected["streams"]) >= 8
    assert codec.codec_id == expected["codec_id"]
    for name, wanted in expected["streams"].items():
        data = (GOLDEN / folder / f"{name}.dicm").read_bytes()
        for count, state in enumerate(wanted["states"], 1):
            symbols = codec._decode_symbols(data, count)[1]
            assert digest(symbols) == state["symbols_sha256"], (name, count)
            pixels = codec.decode([data], states=count)[0]
            assert abs(float(pixels.mean()) - state["mean"]) < 0.05, (name, count)


@pytest.mark.parametrize("folder", CHECKPOINTS)
def test_golden_symbols_are_coded_to_golden_payloads(folder: str) -> None:
    codec = load_codec(GOLDEN / CHECKPOINTS[folder], device="cpu")
    assert isinstance(codec, LayeredCodec)
    for name in ("landscape", "odd", "flat"):
        data = (GOLDEN / folder / f"{name}.dicm").read_bytes()
        symbols = codec._decode_symbols(data, None)[1]
        coded = codec._coder.encode(as_rounded(symbols))
        assert [t.payload for t in coded] == [s.payload for s in parse_bitstream(data).states]


@pytest.mark.parametrize("folder", CHECKPOINTS)
def test_the_reference_decoder_reads_golden_streams(folder: str) -> None:
    expected = json.loads((GOLDEN / folder / "expected.json").read_text())
    for name in ("odd", "noise"):
        data = (GOLDEN / folder / f"{name}.dicm").read_bytes()
        _, symbols, count = reference_decoder.decode_symbols(GOLDEN / CHECKPOINTS[folder], data)
        wanted = expected["streams"][name]["states"][count - 1]["symbols_sha256"]
        assert digest(np.moveaxis(symbols, 0, 2)) == wanted


def test_a_checkpoint_is_what_its_files_are(tmp_path: Path) -> None:
    for file in (GOLDEN / "checkpoint").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    original = read_checkpoint(tmp_path)
    assert original.codec_id == read_checkpoint(GOLDEN / "checkpoint").codec_id
    (tmp_path / "NOTES.md").write_text("travels along")
    assert read_checkpoint(tmp_path).codec_id == original.codec_id
    assert "NOTES.md" in read_checkpoint(tmp_path).files
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"finest_step": 40.0', '"finest_step": 41.0')
    )
    assert read_checkpoint(tmp_path).codec_id != original.codec_id


def test_files_of_two_checkpoints_never_pass_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that is killed between the files leaves what is no checkpoint."""
    golden = read_checkpoint(GOLDEN / "checkpoint")
    network = CodecNetwork(NetworkConfig.from_dict(golden.config["network"]))
    arrays = safetensors.numpy.load(golden.files["tables.safetensors"])
    tables = ContextTables.from_arrays(arrays, "golden")
    written = export.write_checkpoint(network, tables, tmp_path, provenance={"crops": 7})
    assert written.config["provenance"] == {"crops": 7}

    def die(_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save", die)
    with pytest.raises(KeyboardInterrupt):
        export.write_checkpoint(network, tables, tmp_path, provenance={"crops": 8})
    with pytest.raises(WeightsError, match=r"config\.json missing"):
        read_checkpoint(tmp_path)


def test_a_checkpoint_carries_the_formats_and_a_reference_decoder() -> None:
    schemas = Path(__file__).parents[2] / "schemas"
    files = read_checkpoint(GOLDEN / "checkpoint").files
    for name in ("bitstream.v1.md", "layered-payload.v1.md", "layered-payload.v2.md"):
        assert files[f"formats/{name}"] == (schemas / name).read_bytes(), name
    assert b"def decode_symbols(" in files["reference_decoder.py"]


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors", "tables.safetensors"])
def test_an_incomplete_or_damaged_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    for file in (GOLDEN / "checkpoint").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError):
        load_codec(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(WeightsError, match=name):
        load_codec(tmp_path)


def altered_checkpoint(
    folder: Path, config: dict[str, Any] | None = None, tables: dict[str, Any] | None = None
) -> Path:
    """The golden checkpoint with some fields of its configuration or tables replaced."""
    for file in (GOLDEN / "checkpoint").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    whole = json.loads((folder / "config.json").read_text())
    network = whole["network"] | (config or {}).pop("network", {})
    (folder / "config.json").write_text(json.dumps(whole | (config or {}) | {"network": network}))
    arrays = safetensors.numpy.load_file(folder / "tables.safetensors")
    for name, change in (tables or {}).items():
        arrays[name] = np.ascontiguousarray(change(arrays[name]))
    safetensors.numpy.save_file(arrays, folder / "tables.safetensors")
    return folder


def test_payloads_of_another_layout_are_refused(tmp_path: Path) -> None:
    altered = altered_checkpoint(tmp_path, {"coder": "layered/3"})
    with pytest.raises(WeightsError, match="'layered/3', wanted 'layered/1' or 'layered/2'"):
        load_codec(altered)
    with pytest.raises(SystemExit, match="payloads are 'layered/3'"):
        reference_decoder.decode_symbols(altered, b"")


@pytest.mark.parametrize("step", [0, -3, float("nan"), float("inf"), "17"])
def test_a_quantiser_step_that_is_none_is_refused(tmp_path: Path, step: object) -> None:
    with pytest.raises(WeightsError):
        load_codec(altered_checkpoint(tmp_path, {"network": {"finest_step": step}}))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("spread_around", lambda a: a[:, :5], "spread_around is"),
        ("spread_current", lambda a: a[:1], "spread_current is"),
        ("spread_bias", lambda a: a[0], "spread_bias is"),
        ("spread_buckets", lambda a: a[:, 1:], "spread_buckets is"),
        ("frequencies_0", lambda a: a[0], "frequencies_0 is"),
        ("groups", lambda a: a[:0], "groups"),
        ("spread_around", lambda a: a + np.float32(0.5), "spread_around has weights"),
        ("spread_sides", lambda a: a + np.float32(0.5), "spread_near has weights"),
        ("offset_edges", lambda a: a[::-1], "offset edges"),
    ],
)
def test_tables_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, change: Callable[[Any], Any], said: str
) -> None:
    with pytest.raises(WeightsError, match=said):
        load_codec(altered_checkpoint(tmp_path, tables={name: change}))


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(DeviceError, match=device):
        load_codec(GOLDEN / "checkpoint", device=device)


def test_a_precision_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="precision is 'bf16'"):
        load_codec(GOLDEN / "checkpoint", precision="bf16")  # type: ignore[arg-type]


@pytest.mark.parametrize("states", [0, -1])
def test_no_states_are_refused_for_a_picture_just_encoded_too(
    codec: LayeredCodec, states: int
) -> None:
    data = encode(codec, picture(20, 20))
    with pytest.raises(ValueError, match="wanted 1 or more"):
        codec.decode([data], states=states)


def test_a_picture_that_no_header_can_hold_is_refused_before_it_is_coded(
    codec: LayeredCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "_code", lambda image: pytest.fail("it was coded"))
    with pytest.raises(EncodeError, match="66000x2"):
        encode(codec, np.zeros((2, 66_000, 3), np.uint8))


class LoadedIn(Dataset[dict[str, int]]):
    """Threads after loading a codec in the process that asks, which had three for matrices."""

    def __init__(self, threads: int | None) -> None:
        self.threads = threads

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, int]:
        threadpool_limits(3, user_api="blas")
        load_codec(GOLDEN / "checkpoint", device="cpu", threads=self.threads)
        numpy_threads = {
            lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"
        }
        return {"torch": torch.get_num_threads(), "numpy": numpy_threads.pop()}


@pytest.mark.parametrize(("threads", "wanted"), [(None, 1), (2, 2)])
def test_a_worker_of_a_loader_multiplies_matrices_with_no_more_threads_than_torch(
    threads: int | None, wanted: int
) -> None:
    loader = DataLoader(LoadedIn(threads), batch_size=None, num_workers=1)
    assert list(loader) == [{"torch": wanted, "numpy": wanted}]


def test_outside_a_loader_threads_are_left_alone() -> None:
    before = {lib["filepath"]: lib["num_threads"] for lib in threadpool_info()}
    with threadpool_limits():
        found = LoadedIn(None)[0]
    assert found == {"torch": torch.get_num_threads(), "numpy": 3}
    assert {lib["filepath"]: lib["num_threads"] for lib in threadpool_info()} == before
