"""ExactEntropyModel: lfgcm's symbols <-> bytes, with every number that chooses a table an integer.

Where a network's float output picks the table of a symbol, two machines that round one sum
differently read different symbols from there on, silently (spec 0.7). Here the hyper-decoder, both
contexts and the entropy parameters run on 16-bit integers (:mod:`.integer_nets`), rounded once from
the trained weights. y_hat is an integer, too, a symbol and a mean in the same fixed point, so that
contexts see exactly what was decoded. Scales pick tables by integer thresholds, and tables are
frozen (:mod:`.entropy_tables`). All of it is in the arrays that a checkpoint carries.

Payload layout and arithmetic: ``schemas/lfgcm-payload.v1.md``. Shapes: M channels of y on i j cells,
N of z on k l, i = 4 k, j = 4 l; no batch axis outside this module.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dicmh_ray.checksum import crc32c
from dicmh_ray.codec.icmh.entropy_tables import (
    MAX_SYMBOL,
    SymbolReader,
    SymbolWriter,
    TableCoder,
)
from dicmh_ray.codec.icmh.exact_fitting import fit_exact_model
from dicmh_ray.codec.icmh.exact_model import (
    HYPER,
    ExactModel,
    channel_net,
    local_net,
    parameters_net,
)
from dicmh_ray.codec.icmh.integer_nets import (
    HIGHEST,
    LOWEST,
    Arrays,
    Engine,
    IntegerNet,
    Integers,
    engine_dtype,
)
from dicmh_ray.codec.icmh.lfgcm import (
    CodingStep,
    LatentCoder,
    coding_steps,
    pack,
    run_steps,
    unpack,
)
from dicmh_ray.errors import EncodeError

Floats = npt.NDArray[np.float32]

SECTION = "lfgcm"
"""Name of the payload in errors."""

CELLS = 4
"""Cells of y per cell of z, along one side."""


@dataclass(frozen=True, slots=True)
class CodedLatent:
    """One image, or one tile of it."""

    payload: bytes
    symbol_crc: int
    """CRC-32C of the symbols of z, then of y, as int16 in channel, row, column order."""

    y_hat: Floats
    """``[M, i, j]``: what a decoder gets."""

    z_hat: Floats
    """``[N, k, l]``."""


@dataclass(frozen=True, slots=True)
class DecodedLatent:
    """The same, decoded."""

    y_hat: Floats
    z_hat: Floats
    symbol_crc: int


class _Parameters(NamedTuple):
    """Of the symbols of one step, packed: ``[c, i, j / 2]``."""

    tables: Integers
    means: Integers
    """In y's fixed point."""


class ExactEntropyModel:
    """Encodes and decodes the latents of one image or tile. Immutable, deterministic everywhere."""

    def __init__(
        self, model: ExactModel, *, engine: Engine | None, device: str | torch.device
    ) -> None:
        self._model = model
        self._device = torch.device(device)
        is_cpu = self._device.type == "cpu"
        self._engine: Engine = engine or ("float64" if is_cpu else "float64-matmul")
        self._networks = _IntegerNetworks(model, self._engine, self._device)
        self._y_coder, self._z_coder = TableCoder(model.y_tables), TableCoder(model.z_tables)

    @property
    def z_channels(self) -> int:
        """N."""
        return self._model.z_medians.size

    @property
    def y_channels(self) -> int:
        """M."""
        return sum(self._model.slices)

    @classmethod
    def fit(
        cls,
        coder: LatentCoder,
        calibration: Sequence[tuple[Tensor, Tensor]],
        *,
        engine: Engine | None = None,
    ) -> "ExactEntropyModel":
        """Round a trained latent coder to integers.

        Args:
            coder: its weights are read, nothing is changed.
            calibration: images and VAE latents as :meth:`LatentCoder.analyse` takes them, a few
                batches on the coder's device. They set the range of every layer, and how many
                outliers the tables expect.
            engine: of the model that is returned.

        Raises:
            ValueError: there is nothing to calibrate with.
            WeightsError: the weights are such that sums would not be exact.
        """
        if not calibration:
            raise ValueError("the calibration holds no image")
        # By way of the arrays: so what a fit returns has passed every check of a load.
        arrays = fit_exact_model(coder, calibration).to_arrays()
        return cls.from_arrays(arrays, engine=engine)

    def to_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Named integer arrays for ``tables.safetensors``."""
        return self._model.to_arrays()

    @classmethod
    def from_arrays(
        cls, arrays: Arrays, *, engine: Engine | None = None, device: str | torch.device = "cpu"
    ) -> "ExactEntropyModel":
        """Rebuild and prove what :meth:`to_arrays` gave. Arrays of other names are left alone.

        Args:
            arrays: integers.
            engine: how sums are done; by default float64, in matrix products off the CPU.
            device: where the networks run. It makes no difference to any result.

        Raises:
            WeightsError: an array is missing or breaks an invariant.
        """
        return cls(ExactModel.from_arrays(arrays), engine=engine, device=device)

    def encode(self, y_Mij: Floats, z_Nkl: Floats) -> CodedLatent:
        """Encode latents as :meth:`LatentCoder.analyse` gives them.

        Args:
            y_Mij: float32. Clipped to 32,767 steps around its means.
            z_Nkl: float32. Clipped to 32,767 steps around its medians.

        Raises:
            EncodeError: a latent is not finite.
            ValueError: a shape does not fit.
        """
        grid = self._check_grid(y_Mij.shape[1:])
        if y_Mij.shape != (self.y_channels, *grid) or z_Nkl.shape != self._z_shape(grid):
            raise ValueError(f"y is {y_Mij.shape} and z is {z_Nkl.shape}")
        if not (np.isfinite(y_Mij).all() and np.isfinite(z_Nkl).all()):
            raise EncodeError("the latent is not finite")
        writer = SymbolWriter()

        def write(coder: TableCoder, tables: Integers, values: Floats, means: Integers) -> Integers:
            fraction = self._fraction(coder)
            steps = np.rint(
                values.astype(np.float64) - np.ldexp(means.astype(np.float64), -fraction)
            )
            symbols = np.clip(steps, -MAX_SYMBOL, MAX_SYMBOL).astype(np.int64)
            writer.write(coder, tables.ravel(), symbols.ravel())
            return symbols

        def write_z(tables: Integers, medians: Integers) -> Integers:
            return write(self._z_coder, tables, z_Nkl, medians)

        def write_y(step: CodingStep, parameters: _Parameters) -> Integers:
            values = pack(torch.from_numpy(y_Mij[step.channels]), step.is_anchor).numpy()
            return write(self._y_coder, parameters.tables, values, parameters.means)

        decoded = self._walk(grid, write_z, write_y)
        return CodedLatent(writer.finish(), decoded.symbol_crc, decoded.y_hat, decoded.z_hat)

    def decode(self, payload: bytes, grid: tuple[int, int]) -> DecodedLatent:
        """Decode what :meth:`encode` wrote.

        Args:
            payload: any bytes.
            grid: ``(i, j)``, computed from the picture's size. Time and memory follow it, whatever
                the payload.

        Raises:
            SymbolError: no encoder wrote this payload for this grid. Most damage ends here; the
                rest shows in ``symbol_crc``, which the caller compares.
            ValueError: the sides of the grid are no positive multiples of 4.
        """
        grid = self._check_grid(grid)
        num_symbols = int(np.prod(self._z_shape(grid))) + self.y_channels * grid[0] * grid[1]
        reader = SymbolReader(payload, num_symbols, SECTION)

        def read_z(tables: Integers, _medians: Integers) -> Integers:
            return reader.read(self._z_coder, tables.ravel()).reshape(tables.shape)

        def read_y(_step: CodingStep, parameters: _Parameters) -> Integers:
            tables = parameters.tables
            return reader.read(self._y_coder, tables.ravel()).reshape(tables.shape)

        decoded = self._walk(grid, read_z, read_y)
        reader.finish()
        return decoded

    def _walk(
        self,
        grid: tuple[int, int],
        visit_z: Callable[[Integers, Integers], Integers],
        visit_y: Callable[[CodingStep, _Parameters], Integers],
    ) -> DecodedLatent:
        """Visit all symbols in coding order; visits return them, known or decoded."""
        model, dtype = self._model, engine_dtype(self._engine)
        shape = self._z_shape(grid)
        tables = np.broadcast_to(np.arange(self.z_channels)[:, None, None], shape)
        medians = np.broadcast_to(model.z_medians[:, None, None], shape)
        z_symbols = visit_z(tables, medians)
        z_int = (z_symbols << model.z_fraction) + medians
        y_symbols = np.empty((self.y_channels, *grid), np.int16)
        y_int = np.empty((self.y_channels, *grid), np.int32)

        def visit(step: CodingStep) -> Tensor:
            parameters: _Parameters = step.parameters
            symbols = visit_y(step, parameters)
            values = (symbols << model.y_fraction) + parameters.means
            for whole, part in ((y_symbols, symbols), (y_int, values)):
                own = whole[step.channels]
                own[:, 0::2, int(step.is_anchor) :: 2] = part[:, 0::2]
                own[:, 1::2, int(not step.is_anchor) :: 2] = part[:, 1::2]
            seen = torch.from_numpy(values[None].clip(LOWEST, HIGHEST)).to(self._device, dtype)
            return unpack(seen, step.is_anchor)

        with _exact_arithmetic(self._device):
            seen = torch.from_numpy(z_int[None].clip(LOWEST, HIGHEST)).to(self._device, dtype)
            hyper = self._networks.hyper_decoder(seen)
            run_steps(coding_steps(self._networks, hyper, model.slices), visit)
        crc = crc32c(z_symbols.astype("<i2").tobytes())
        return DecodedLatent(
            y_hat=np.ldexp(y_int.astype(np.float32), -model.y_fraction),
            z_hat=np.ldexp(z_int.astype(np.float32), -model.z_fraction),
            symbol_crc=crc32c(y_symbols.astype("<i2").tobytes(), crc),
        )

    def _fraction(self, coder: TableCoder) -> int:
        return self._model.y_fraction if coder is self._y_coder else self._model.z_fraction

    def _z_shape(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        return self.z_channels, grid[0] // CELLS, grid[1] // CELLS

    def _check_grid(self, grid: Sequence[int]) -> tuple[int, int]:
        rows, columns = grid
        if rows < 1 or columns < 1 or rows % CELLS or columns % CELLS:
            raise ValueError(f"a grid of {rows}x{columns}, wanted positive multiples of {CELLS}")
        return rows, columns


class _IntegerNetworks:
    """The networks of :class:`ContextNetworks`, on ``[1, C, i, j]`` in the engine's type."""

    def __init__(self, model: ExactModel, engine: Engine, device: torch.device) -> None:
        build = functools.partial(
            IntegerNet, gelu_tables=model.gelu_tables, engine=engine, device=device
        )
        count = len(model.slices)
        self._model = model
        self.hyper_decoder = build(model.nets[HYPER], upsamples=(True, True, False))
        self._from_channels = [None] + [build(model.nets[channel_net(i)]) for i in range(1, count)]
        self._from_anchors = [build(model.nets[local_net(i)]) for i in range(count)]
        self._from_contexts = {
            (i, is_anchor): build(model.nets[parameters_net(i, is_anchor)], is_wide=True)
            for i, is_anchor in itertools.product(range(count), (True, False))
        }

    def from_channels(self, index: int, decoded: Tensor) -> Tensor:
        network = self._from_channels[index]
        if network is None:
            raise ValueError("the first slice has no channel context")
        return network(decoded)

    def from_anchors(self, index: int, anchors: Tensor) -> Tensor:
        return self._from_anchors[index](anchors)

    def from_contexts(self, index: int, is_anchor: bool, contexts: Sequence[Tensor]) -> _Parameters:
        # Position by position: only those of the step's parity are needed.
        packed = pack(torch.cat(list(contexts), 1), is_anchor)
        values = self._from_contexts[index, is_anchor](packed)[0].long().cpu().numpy()
        scales, means = np.split(values, 2)
        return _Parameters(np.searchsorted(self._model.scale_thresholds, scales), means)


@contextmanager
def _exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No gradients, and nothing that makes numbers shorter, whatever surrounds the call."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
