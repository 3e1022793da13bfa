"""LayeredCodec: the networks and the symbol coder in encode and decode order.

    image ──network──> y ──round──> symbols ──SymbolCoder──> states ──frame──> bitstream
    bitstream ──SymbolCoder──> symbols ──x step──> y ──network(state)──> image

Large pictures are cut twice: the symbols into tiles of 64x64 cells that are coded on their own,
and the networks' work into overlapping windows whose overlap covers the networks' reach, so that
the result is that of one pass. Memory is the symbols and samples of one picture plus one window.

Shape suffixes: B images, C channels, i j the grid of y (1/16).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from dicmh_ray.bitstream import Header, State, crc32c, parse_bitstream, write_bitstream
from dicmh_ray.codec import Precision, Quality, TaggedStream, TagScore
from dicmh_ray.codec.checkpoint import LATENT_UNIT, LAYERED_CODERS, TAGGER_FILE, Checkpoint
from dicmh_ray.codec.contexts import Symbols
from dicmh_ray.codec.device import find_device, use_threads
from dicmh_ray.codec.framing import framed, header_of
from dicmh_ray.codec.image_taggers import without_known
from dicmh_ray.codec.network import ALIGNMENT, CodecNetwork, NetworkConfig
from dicmh_ray.codec.noise import noise_key, window_noise
from dicmh_ray.codec.quality import measure
from dicmh_ray.codec.symbols import (
    MAX_SYMBOL,
    RoundedLatent,
    SymbolCoder,
    nested_symbols,
    round_latent,
)
from dicmh_ray.codec.tables import RATIO, ContextTables
from dicmh_ray.codec.tagger import TaggerHead, picture_features
from dicmh_ray.codec.tiles import Window, join_tiles, split_tiles, tiles, windows
from dicmh_ray.codec.transform import native_precision
from dicmh_ray.errors import (
    CodecMismatchError,
    EncodeError,
    InvalidHeaderError,
    SymbolError,
    ViewError,
    WeightsError,
)

TILE = 64
"""Cells per side of a tile of symbols: 1024 pixels."""

WINDOW = 128
"""Cells per side of a window of the networks: 2048 pixels."""

MAX_REMEMBERED = 24_000_000
"""Symbols of a picture that are kept between ``encode`` and the decodes that choose its states: 16 megapixels."""


class _Noise(NamedTuple):
    """What a human view is sampled from, beside the symbols."""

    key: int
    tags: tuple[str, ...]


class _Coded(NamedTuple):
    """A picture on its way into a stream."""

    symbols: Symbols
    states: list[State]


class LayeredCodec:
    """The default codec. See :class:`dicmh_ray.codec.ImageCodec` for the contract."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        network: CodecNetwork,
        tables: ContextTables,
        latent_unit: npt.NDArray[np.float32],
        device: torch.device,
    ) -> None:
        self.codec_id = checkpoint.codec_id
        self.num_states = network.config.num_states
        self.latent_channels = network.config.y_channels
        self.views: tuple[str, ...] = (
            ("machine", "human") if network.human is not None else ("machine",)
        )
        self._steps = network.config.steps
        self._device = device
        self._network = network.eval().to(self._device).to(memory_format=torch.channels_last)
        self._coder = SymbolCoder(tables)
        self._verified: list[tuple[bytes, Symbols]] = []
        self._unit = latent_unit
        self._tagger_bytes = checkpoint.files.get(TAGGER_FILE)
        self._tagger_head: TaggerHead | None = None

    def encode(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        tags: Sequence[Sequence[str]],
        exif_orientations: Sequence[int],
    ) -> list[bytes]:
        self._verified.clear()
        return [
            self._write(self._header(image, orientation), self._code(image), own)
            for image, own, orientation in zip(images, tags, exif_orientations, strict=True)
        ]

    def encode_with_suggestions(
        self,
        images: Sequence[npt.NDArray[np.uint8]],
        *,
        tags: Sequence[Sequence[str]],
        exif_orientations: Sequence[int],
    ) -> list[TaggedStream]:
        """See :class:`dicmh_ray.codec.TagSuggester`."""
        tagger = self._tagger()
        tagged = []
        self._verified.clear()
        for image, own, orientation in zip(images, tags, exif_orientations, strict=True):
            header = self._header(image, orientation)
            coded = self._code(image)
            added = without_known(own, tagger.suggest(picture_features(coded.symbols)))
            every = [*own, *(tag.tag for tag in added)]
            tagged.append(TaggedStream(self._write(header, coded, every), added))
        return tagged

    def suggest_tags(self, bitstreams: Sequence[bytes]) -> list[tuple[TagScore, ...]]:
        """See :class:`dicmh_ray.codec.TagSuggester`."""
        tagger = self._tagger()
        return [tagger.suggest(picture_features(self._finest(data))) for data in bitstreams]

    def tag_probabilities(self, bitstreams: Sequence[bytes]) -> list[list[TagScore]]:
        """See :class:`dicmh_ray.codec.TagSuggester`."""
        tagger = self._tagger()
        return [tagger.probabilities(picture_features(self._finest(data))) for data in bitstreams]

    def tag_features(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Features ``[F]`` of a picture, for fitting a tagger; see :mod:`dicmh_ray.codec.tagger`."""
        return picture_features(self._code(image).symbols)

    def decode(
        self, bitstreams: Sequence[bytes], *, states: int | None = None, view: str = "machine"
    ) -> list[npt.NDArray[np.uint8]]:
        if view not in self.views:
            raise ViewError(view, ", ".join(self.views))
        images = []
        for data in bitstreams:
            header, symbols, count = self._recall(data, states)
            noise = None
            if view == "human":
                stream = parse_bitstream(data)
                noise = _Noise(noise_key(stream.states[0].payload), stream.tags)
            images.append(framed(self._synthesise(symbols, count - 1, noise), header))
        return images

    def decode_reduced(
        self, bitstreams: Sequence[bytes], reductions: Sequence[int], *, states: int | None = None
    ) -> list[npt.NDArray[np.uint8]]:
        """See :class:`dicmh_ray.codec.ReducingCodec`."""
        images = []
        for data, reduction in zip(bitstreams, reductions, strict=True):
            header, symbols, count = self._recall(data, states)
            image = self._synthesise(symbols, count - 1, reduction=reduction)
            images.append(framed(image, header, reduction))
        return images

    def decode_latent(
        self, bitstreams: Sequence[bytes], *, states: int | None = None
    ) -> list[npt.NDArray[np.float16]]:
        latents = []
        for data in bitstreams:
            _, symbols, count = self._decode_symbols(data, states)
            scale = self._steps[count - 1] / self._unit
            latents.append(np.moveaxis(symbols * scale, 2, 0).astype(np.float16))
        return latents

    def measure(
        self,
        originals: Sequence[npt.NDArray[np.uint8]],
        decoded: Sequence[npt.NDArray[np.uint8]],
    ) -> list[Quality]:
        return measure(originals, decoded)

    def _header(self, image: npt.NDArray[np.uint8], exif_orientation: int) -> Header:
        """Made before the picture is coded: a size that no stream can have is found at once."""
        return header_of(
            image,
            codec_id=self.codec_id,
            exif_orientation=exif_orientation,
            num_states=self.num_states,
        )

    def _write(self, header: Header, coded: _Coded, tags: Sequence[str]) -> bytes:
        """Write a picture's stream, and decode its symbols again to be sure."""
        data = write_bitstream(header, tags, coded.states)
        if not np.array_equal(self._decode_symbols(data, None)[1], coded.symbols):
            raise EncodeError("the stream does not decode to the symbols that were encoded")
        if coded.symbols.size <= MAX_REMEMBERED:
            self._verified.append((data, coded.symbols))
        return data

    def _tagger(self) -> TaggerHead:
        """The tagger, read when it is first wanted: one that does not fit must not stop decoding."""
        if self._tagger_head is None:
            if self._tagger_bytes is None:
                raise WeightsError(
                    self.codec_id[:16],
                    f"it has no tagger: fit {TAGGER_FILE} with `dicmh train-tagger`",
                )
            self._tagger_head = TaggerHead.from_bytes(
                self._tagger_bytes, codec_id=self.codec_id, channels=self.latent_channels
            )
        return self._tagger_head

    def _finest(self, data: bytes) -> Symbols:
        """Symbols of a stream at the scale of the last state, however many states it has."""
        _, symbols, count = self._recall(data, None)
        scaled = symbols.astype(np.int32) * RATIO ** (self.num_states - count)
        return np.clip(scaled, -MAX_SYMBOL, MAX_SYMBOL).astype(np.int16)

    def _analyse(self, image: npt.NDArray[np.uint8]) -> RoundedLatent:
        """What there is to encode of a picture."""
        rows, columns = (-(-side // ALIGNMENT) for side in image.shape[:2])
        shape = (rows, columns, self.latent_channels)
        rounded = RoundedLatent(np.empty(shape, np.int16), np.empty(shape, np.uint8))
        for down in windows(rows, size=WINDOW, margin=self._network.config.encode_margin):
            for across in windows(columns, size=WINDOW, margin=self._network.config.encode_margin):
                region = image[down.outer(ALIGNMENT), across.outer(ALIGNMENT)]
                height = ALIGNMENT * (down.outer_stop - down.outer_start)
                width = ALIGNMENT * (across.outer_stop - across.outer_start)
                padding = ((0, height - region.shape[0]), (0, width - region.shape[1]), (0, 0))
                latent = self._run(
                    lambda x: self._network.encode(x.permute(0, 3, 1, 2).float()),
                    np.pad(region, padding, "edge")[None],
                )[0]
                inner = latent[:, down.inner(), across.inner()]
                part = round_latent(np.moveaxis(inner, 0, 2), self._steps[-1])
                rounded.symbols[down.whole(), across.whole()] = part.symbols
                rounded.reaches[down.whole(), across.whole()] = part.reaches
        return rounded

    def _code(self, image: npt.NDArray[np.uint8]) -> _Coded:
        """The symbols that a picture's stream has, and the states of that stream."""
        rounded = self._analyse(image)
        symbols, coded = rounded.symbols, []
        for place in tiles(symbols.shape[:2], size=TILE):
            parts = (np.ascontiguousarray(part[place]) for part in (symbols, rounded.reaches))
            coded.append(self._coder.encode(RoundedLatent(*parts)))
            symbols[place] = coded[-1][-1].symbols
        states = []
        for state in range(self.num_states):
            payloads = [tile[state].payload for tile in coded]
            crc = 0
            for tile in coded:
                crc = crc32c(tile[state].refinement, crc)
            states.append(State(join_tiles(payloads), crc))
        return _Coded(symbols, states)

    def _recall(self, data: bytes, states: int | None) -> tuple[Header, Symbols, int]:
        """As ``_decode_symbols``, but a prefix of a stream that ``encode`` has just verified.

        The caller of ``encode`` decodes prefixes of it to choose the states: their symbols were
        decoded from these very bytes a moment ago, and coarser ones follow from the finest.
        """
        if states is not None and states < 1:
            raise ValueError(f"states is {states}, wanted 1 or more")
        for whole, finest in self._verified:
            if whole.startswith(data):
                stream = parse_bitstream(data)
                count = len(stream.states[:states])
                levels = nested_symbols(finest, self.num_states)
                return stream.header, levels[count - 1], count
        return self._decode_symbols(data, states)

    def _decode_symbols(self, data: bytes, states: int | None) -> tuple[Header, Symbols, int]:
        """Header, symbols int16 ``[i, j, C]`` of the last wanted state, and how many states."""
        stream = parse_bitstream(data)
        header = stream.header
        if header.codec_id != self.codec_id[:16]:
            raise CodecMismatchError(self.codec_id[:16], header.codec_id)
        if len(stream.states) > self.num_states:
            raise InvalidHeaderError("state count", header.num_states, f"1..{self.num_states}")
        if states is not None and states < 1:
            raise ValueError(f"states is {states}, wanted 1 or more")
        wanted = stream.states[:states]
        shape = (-(-header.height // ALIGNMENT), -(-header.width // ALIGNMENT))
        places = list(tiles(shape, size=TILE))
        payloads = [
            split_tiles(state.payload, len(places), f"state {k}") for k, state in enumerate(wanted)
        ]
        symbols = np.empty((*shape, self.latent_channels), np.int16)
        crcs = [0] * len(wanted)
        for number, (rows, columns) in enumerate(places):
            parent: Symbols | None = None
            cells = (rows.stop - rows.start, columns.stop - columns.start)
            for state in range(len(wanted)):
                tile = self._coder.decode(state, parent, cells, payloads[state][number])
                crcs[state] = crc32c(tile.refinement, crcs[state])
                parent = tile.symbols
            symbols[rows, columns] = parent
        for number, (crc, coded) in enumerate(zip(crcs, wanted, strict=True)):
            if crc != coded.symbol_crc:
                raise SymbolError(f"state {number}", "symbols do not match their checksum")
        return header, symbols, len(wanted)

    def _synthesise(
        self, symbols: Symbols, state: int, noise: _Noise | None = None, reduction: int = 1
    ) -> npt.NDArray[np.uint8]:
        """Pixels of the machine view, or with noise of the human view; whole cells."""
        rows, columns = symbols.shape[:2]
        cell = ALIGNMENT // reduction
        margin = self._network.config.decode_margin
        if noise is not None:
            margin += self._network.config.human_margin
        image = np.empty((cell * rows, cell * columns, 3), np.uint8)
        step = self._steps[state]

        def pixels(symbols_BijC: Tensor, down: Window, across: Window) -> Tensor:
            states_B = torch.full((len(symbols_BijC),), state, device=self._device)
            y_BCij = symbols_BijC.permute(0, 3, 1, 2).float() * step
            z_BChw = self._network.estimate(y_BCij, states_B)
            if noise is not None:
                z_BChw = self._restore(z_BChw, states_B, noise, down, across)
            x = self._network.autoencoder.decode(z_BChw, reduction)
            return x.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)

        for down in windows(rows, size=WINDOW, margin=margin):
            for across in windows(columns, size=WINDOW, margin=margin):
                region = symbols[down.outer(), across.outer()]
                draw = functools.partial(pixels, down=down, across=across)
                x = self._run(draw, region[None])[0]
                image[down.whole(cell), across.whole(cell)] = x[
                    down.inner(cell), across.inner(cell)
                ]
        return image

    def _restore(
        self, z_BChw: Tensor, state_B: Tensor, noise: _Noise, down: Window, across: Window
    ) -> Tensor:
        """Machine estimate of a window of one picture -> human estimate."""
        restorer = self._network.human
        if restorer is None:
            raise ViewError("human", ", ".join(self.views))
        rows = (2 * down.outer_start, 2 * down.outer_stop)
        columns = (2 * across.outer_start, 2 * across.outer_stop)
        normals = restorer.normals.cpu().numpy()
        drawn = [
            torch.from_numpy(window_noise(noise.key, i, rows, columns, len(z_BChw[0]), normals))
            for i in range(self._network.config.human_evaluations)
        ]
        words_BN = restorer.known_words(noise.tags)[None].to(self._device)
        return restorer.sample(z_BChw, state_B, words_BN, [n[None].to(self._device) for n in drawn])

    def _run(
        self, function: Callable[[Tensor], Tensor], array: npt.NDArray[Any]
    ) -> npt.NDArray[Any]:
        """Run a network on an array, in its own precision whatever autocast the caller is under."""
        with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
            tensor = torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
            result: npt.NDArray[Any] = function(tensor).cpu().numpy()
        return result


def load_layered_codec(
    content: Checkpoint,
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: Precision = "auto",
) -> LayeredCodec:
    """Load a checkpoint's networks and tables. Else as ``load_codec``."""
    use_threads(threads)
    if precision not in get_args(Precision):
        raise ValueError(f"precision is {precision!r}, wanted {' or '.join(get_args(Precision))}")
    found = find_device(device)
    coder = content.config.get("coder")
    if coder not in LAYERED_CODERS:
        wanted = " or ".join(map(repr, LAYERED_CODERS))
        raise WeightsError(content.name, f"coder is {coder!r}, wanted {wanted}")
    try:
        network = CodecNetwork(NetworkConfig.from_dict(content.config["network"]))
        weights = safetensors.torch.load(content.files["weights.safetensors"])
        unit = weights.pop(LATENT_UNIT, None)
        network.load_state_dict({key: value.float() for key, value in weights.items()})
        if unit is None:
            unit = network.latent.unit().detach()
        tables = safetensors.numpy.load(content.files["tables.safetensors"])
    except (KeyError, TypeError, RuntimeError, ValueError, safetensors.SafetensorError) as exc:
        raise WeightsError(content.name, str(exc)) from exc
    for key, value in network.state_dict().items():
        if not torch.isfinite(value).all():
            raise WeightsError(content.name, f"{key} is not finite")
    if precision == "auto":
        network.compute_in(native_precision(found))
    frozen = ContextTables.from_arrays(tables, content.name)
    return LayeredCodec(content, network, frozen, unit.numpy(), found)
