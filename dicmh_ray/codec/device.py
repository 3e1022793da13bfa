"""What a codec computes on: the device of torch, and the threads of a process."""

import torch
from threadpoolctl import threadpool_limits
from torch.utils.data import get_worker_info

from dicmh_ray.errors import DeviceError


def use_threads(threads: int | None) -> None:
    """Let torch and the matrix products of numpy have so many threads in this process.

    Args:
        threads: how many; None leaves both their choice, except in a worker of a DataLoader, where
            numpy gets as few as torch has: every worker with a thread for every core is slow.
    """
    if threads is None and get_worker_info() is not None:
        threads = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
        threadpool_limits(threads, user_api="blas")


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
