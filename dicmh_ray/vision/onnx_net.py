"""An ONNX file as a function from pictures to arrays, with a look inside where one is wanted."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from dicmh_ray.errors import MissingExtraError, NetError

Array = npt.NDArray[Any]
Picture = npt.NDArray[np.uint8]


class OnnxNet:
    """A net on the CPU, on one thread of whoever calls it. Safe to call from several threads."""

    def __init__(
        self, path: str | Path, outputs: Sequence[str] = (), data: bytes | None = None
    ) -> None:
        """Load a file.

        Args:
            path: the ONNX file.
            outputs: tensors that a call returns, also inner ones; none means the graph's outputs.
            data: the file's bytes, where they were read already; ``path`` is then only its name.

        Raises:
            NetError: the file is missing, no ONNX model, or has no such tensor.
            MissingExtraError: onnxruntime, or onnx for inner tensors, is not installed.
        """
        self.path = Path(path)
        try:
            import onnxruntime
        except ImportError as exc:
            raise MissingExtraError("onnxruntime", "bench") from exc
        try:
            data = self.path.read_bytes() if data is None else data
        except OSError as exc:
            raise NetError(self.path.name, f"cannot be read: {exc}") from exc
        self.sha256 = hashlib.sha256(data).hexdigest()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4  # what matters comes as an exception
        wanted = tuple(outputs)
        try:
            session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
            if not set(wanted) <= {output.name for output in session.get_outputs()}:
                data = _with_outputs(data, wanted)
                session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
        except MissingExtraError:
            raise
        except Exception as exc:  # the library's own classes have no public base
            raise NetError(self.path.name, f"cannot be loaded: {exc}") from exc
        self._session = session
        self.outputs = wanted or tuple(output.name for output in session.get_outputs())
        self.inputs = tuple(one.name for one in session.get_inputs())
        self.input_shape: tuple[int | None, ...] = tuple(
            size if isinstance(size, int) else None for size in session.get_inputs()[0].shape
        )

    @property
    def input_hw(self) -> tuple[int, int] | None:
        """Height and width the first input must have; None where it takes any."""
        if len(self.input_shape) != 4:
            raise NetError(self.path.name, f"input is {self.input_shape}, wanted [N, 3, H, W]")
        height, width = self.input_shape[2:]
        return None if height is None or width is None else (height, width)

    def __call__(self, *inputs: Array) -> dict[str, Array]:
        """Run the net on float32 arrays, in the order of its inputs.

        Raises:
            NetError: the net does not take them.
        """
        feed = dict(zip(self.inputs, inputs, strict=True))
        try:
            found = self._session.run(list(self.outputs), feed)
        except Exception as exc:  # as above
            raise NetError(self.path.name, f"cannot be run: {exc}") from exc
        return dict(zip(self.outputs, found, strict=True))


def resized(image: Picture, height: int, width: int) -> Picture:
    """A uint8 ``[H, W, 3]`` picture at another size (bilinear, antialiased)."""
    if image.shape[:2] == (height, width):
        return image
    size = (width, height)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))


def centre_crop(image: Picture, height: int, width: int, *, margin: float = 0.875) -> Picture:
    """The middle of a picture, as classifiers are tested: ``margin`` of the shorter side."""
    scale = max(height / image.shape[0], width / image.shape[1]) / margin
    small = resized(
        image,
        max(height, round(scale * image.shape[0])),
        max(width, round(scale * image.shape[1])),
    )
    top, left = (small.shape[0] - height) // 2, (small.shape[1] - width) // 2
    return small[top : top + height, left : left + width]


def planes(image: Picture, *, mean: float, scale: float, is_bgr: bool = False) -> Array:
    """float32 ``[1, 3, H, W]`` of a picture: ``(x - mean) / scale``."""
    ordered = image[..., ::-1] if is_bgr else image
    values = ordered.transpose(2, 0, 1)[None].astype(np.float32)
    return (values - np.float32(mean)) / np.float32(scale)


def _with_outputs(data: bytes, names: Sequence[str]) -> bytes:
    """The model with these tensors for its outputs; what none of them needs is not computed."""
    try:
        import onnx
    except ImportError as exc:
        raise MissingExtraError("onnx", "bench") from exc
    model = onnx.load_model_from_string(data)
    inner = {name for node in model.graph.node for name in node.output}
    if unknown := sorted(set(names) - inner):
        raise ValueError(f"no tensor is called {', '.join(unknown)}")
    del model.graph.output[:]
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names
    )
    return bytes(model.SerializeToString())
