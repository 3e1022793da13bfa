"""A second device for machines that have none.

Its tensors compute on the CPU, and yet are no tensors of the CPU: as with CUDA, an operation takes operands
of one device, and numpy reads none of the second. Code that forgets to move a tensor, or to fetch it, fails here as it
would on a GPU. Nothing is said about a GPU's arithmetic, its memory or its speed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
"""What the second device calls itself."""

FROM_ANY_DEVICE = {"aten::copy_", "aten::_to_copy"}

INDEXED_FROM_ANY_DEVICE = {"aten::index", "aten::index_put", "aten::index_put_"}
"""A tensor of CUDA may be indexed with one of the CPU; not the other way round."""


class DeviceMixError(RuntimeError):
    """An operation was given operands of both devices."""


class SecondDeviceTensor(Tensor):
    """A tensor on the second device: a tensor of the CPU that only its own operations see."""

    hidden: Tensor

    @staticmethod
    def __new__(cls, hidden: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(
            cls,
            hidden.size(),
            strides=hidden.stride(),
            storage_offset=hidden.storage_offset(),
            dtype=hidden.dtype,
            layout=hidden.layout,
            device=hidden.device,
        )
        made.hidden = hidden
        return made

    def __repr__(self) -> str:  # pytest's assertions print operands
        return f"SecondDeviceTensor({self.hidden!r})"

    # Both make it a traceable subclass, whose modules torch moves by swapping their tensors.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["hidden"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: object) -> "SecondDeviceTensor":
        return SecondDeviceTensor(parts["hidden"])

    @classmethod
    def __torch_dispatch__(
        cls,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        operands = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        _require_one_device(function._schema.name, operands)
        hidden = {id(x.hidden): x for x in operands if isinstance(x, cls)}
        plain = {id(x) for x in operands if not isinstance(x, cls)}
        args, kwargs = tree_map_only(cls, lambda x: x.hidden, (args, kwargs or {}))

        def shown(result: Tensor) -> Tensor:
            # What an operation writes in place stays the tensor that it was.
            if id(result) in plain:
                return result
            return hidden[id(result)] if id(result) in hidden else cls(result)

        return tree_map_only(Tensor, shown, function(*args, **kwargs))


def _require_one_device(operation: str, operands: Sequence[Tensor]) -> None:
    if operation in FROM_ANY_DEVICE:
        return
    if operation in INDEXED_FROM_ANY_DEVICE and isinstance(operands[0], SecondDeviceTensor):
        return
    # A scalar of the CPU mixes with anything.
    if any(not isinstance(x, SecondDeviceTensor) and x.dim() for x in operands):
        found = [(type(x).__name__, list(x.shape)) for x in operands]
        raise DeviceMixError(f"{operation}: {found}")


class _Move(torch.autograd.Function):
    """From the CPU to the second device, and gradients back."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return SecondDeviceTensor(x.detach().clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return gradient.hidden if isinstance(gradient, SecondDeviceTensor) else gradient


class _Fetch(torch.autograd.Function):
    """From the second device to the CPU, and gradients there."""

    @staticmethod
    def forward(_: Any, x: SecondDeviceTensor) -> Tensor:
        return x.hidden.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return SecondDeviceTensor(gradient)


class _SecondDevice(TorchFunctionMode):
    """Makes torch's functions of Python know the second device by its name."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        name = getattr(function, "__name__", "")
        if name == "to" and isinstance(x, Tensor):
            return _moved(x, function, args[1:], kwargs)
        if isinstance(x, SecondDeviceTensor):
            if getattr(function, "__self__", None) is Tensor.device:
                return DEVICE
            if name == "cpu":
                return _Fetch.apply(x)
            if name == "tolist":
                return x.hidden.tolist()
            if name == "numpy":
                raise TypeError("can't convert a tensor of the second device to numpy")
        elif _is_second(kwargs.get("device")):
            return SecondDeviceTensor(function(*args, **{**kwargs, "device": "cpu"}))
        elif isinstance(x, Tensor) and name == "cuda":
            return _Move.apply(x)
        if isinstance(x, SecondDeviceTensor):
            kwargs.pop("device", None)
        return function(*args, **kwargs)


def _moved(
    x: Tensor, function: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]
) -> Tensor:
    """``x.to(...)``: its dtype and layout first, then its device."""
    device = kwargs.pop("device", None)
    kwargs.pop("non_blocking", None)
    rest: list[Any] = []
    for arg in args:
        if isinstance(arg, str | torch.device):
            device = arg
        elif isinstance(arg, Tensor):
            device = DEVICE if isinstance(arg, SecondDeviceTensor) else "cpu"
            rest.append(arg.dtype)
        elif isinstance(arg, torch.dtype):
            rest.append(arg)
    if rest or kwargs:
        x = function(x, *rest, **kwargs)
    if device is None or _is_second(device) == isinstance(x, SecondDeviceTensor):
        return x
    moved: Tensor = (_Move if _is_second(device) else _Fetch).apply(x)
    return moved


def _is_second(device: object) -> bool:
    return isinstance(device, str | torch.device) and torch.device(device).type == DEVICE.type


@contextmanager
def second_device() -> Iterator[None]:
    """Within it, ``"cuda"`` is the second device, in this thread."""
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with (
            mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
            # Tensors of inference have no versions, which views of a tensor subclass ask for.
            mock.patch.object(torch, "inference_mode", torch.no_grad),
            _SecondDevice(),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)
