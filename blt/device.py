"""Device, precision, seeds and threads."""

import random
from contextlib import contextmanager, nullcontext

import numpy as np
import torch


def choose_device(name="auto"):
    """torch.device: CUDA where there is one, else the CPU; or the one that was named."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA device here; use --device cpu")
    return device


def choose_precision(name, device):
    """'bf16', 'fp16' or 'fp32'; auto takes what the hardware multiplies fastest (a T4 only emulates bf16, so fp16)."""
    if name != "auto":
        if name == "fp16" and device.type != "cuda":
            raise ValueError(f"precision is 'fp16', which needs CUDA; on {device.type} use bf16 or fp32")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


def autocast(device, precision):
    """The context in which a model's matrix products run in this precision; weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def set_seed(seed):
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def synchronize(device):
    """Wait until the device has done what was asked of it, so that a clock read next is honest."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


FEW_ROWS = 16  # below this many rows one CPU thread is as fast as several, and seven times faster where another program uses a core


@contextmanager
def threads_for(n_rows):
    """Compute with one thread while few rows are read byte by byte; the number of threads is put back at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if n_rows < FEW_ROWS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Machines that the presets are sized for, in the order of their memory.
MACHINES = {
    "cpu": "no GPU",
    "colab_t4": "a Tesla T4 or another GPU below 20 GB",
    "rtx4090": "an RTX 4090 or another GPU of 20 to 47 GB",
    "h100": "an H100 or another GPU of 48 to 99 GB",
    "h200": "an H200 or another GPU from 100 GB",
}


def detect_machine(device_name="auto"):
    """The name in MACHINES of what this device is: the CPU, or the class of its GPU by memory."""
    device = choose_device(device_name)
    if device.type != "cuda":
        return "cpu"
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 1e9
    if gigabytes < 20:
        return "colab_t4"
    if gigabytes < 48:
        return "rtx4090"
    return "h100" if gigabytes < 100 else "h200"
