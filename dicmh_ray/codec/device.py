"""Which device torch computes on, found out before anything is read for it."""

import torch

from dicmh_ray.errors import DeviceError


def find_device(name: str) -> torch.device:
    """The torch device of a name.

    Args:
        name: as torch writes it (``"cpu"``, ``"cuda"``, ``"cuda:1"``), or ``"auto"`` for CUDA
            where there is one and the CPU otherwise.

    Raises:
        DeviceError: torch knows no such device, or cannot use it on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        # A build of torch without CUDA asserts; the first line says why, others list devices.
        raise DeviceError(name, (str(exc).splitlines() or [type(exc).__name__])[0]) from exc
    if device.type == "meta":
        raise DeviceError(name, "it computes nothing")
    return device
