"""Device, precision, seeds and threads."""

import importlib.util
import os
import random
import shutil
import sysconfig
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch


def choose_device(name="auto"):
    """The torch.device of this name; "auto" is CUDA if there is one, else the CPU.

    Raises ValueError for any other name than auto, cpu, cuda, cuda:N and mps, and for a device that
    this machine does not have. cuda:N becomes the current device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no CUDA device here; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but torch finds {torch.cuda.device_count()} CUDA device(s) here, numbered from cuda:0"
        )
    if device.type == "cuda" and device.index is not None:
        # Triton's kernels and CUDA graphs are launched on the current device, wherever their tensors are.
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no Apple GPU here; use --device cpu")
    return device


def choose_precision(name, device):
    """The precision of matrix products: "bf16", "fp16" or "fp32"; "auto" is the fastest on this device.

    Raises ValueError for fp16 anywhere but on CUDA.
    """
    if name != "auto":
        if name == "fp16" and device.type != "cuda":
            raise ValueError(f"precision is 'fp16', which needs CUDA; on {device.type} use bf16 or fp32")
        return name
    if device.type == "cuda":
        # Cards older than Ampere (8.0), such as the T4, only emulate bf16.
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    # A CPU without these instructions computes bf16 more slowly than fp32.
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


def what_triton_lacks():
    """What Triton needs to compile kernels and this machine does not have, in words; None: nothing."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton"
    if "CC" not in os.environ and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "a C compiler (gcc or clang)"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "Python's headers (the package python3-dev)"
    return None


def autocast(device, precision):
    """The context in which a model's matrix products run in this precision; weights stay fp32."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


@contextmanager
def restore_matmul_precision():
    """Restore at the end how torch multiplies fp32 matrices, which `allow_tf32` changes."""
    before = torch.get_float32_matmul_precision()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def allow_tf32(device, precision):
    """On CUDA in fp32, let matrix products round their factors to TF32: several times faster.

    For training, inside `restore_matmul_precision`. The leak gate, generation and compression compare
    numbers to more digits than TF32 has.
    """
    if device.type == "cuda" and precision == "fp32":
        torch.set_float32_matmul_precision("high")


def set_seed(seed):
    """Seed Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def synchronize(device):
    """Wait until the device has finished its work, so that a clock can be read."""
    # A GPU only queues what it is told to do: without waiting, a clock measures the launch.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


# Below this many rows one CPU thread is as fast as several. Where another program uses a core, it
# is seven times faster.
FEW_ROWS = 16


@contextmanager
def threads_for(n_rows):
    """Compute with one CPU thread if there are fewer than FEW_ROWS rows; restore the old number at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if n_rows < FEW_ROWS else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Machines that the presets are sized for, in the order of their memory.
MACHINE_NAMES = {
    "cpu": "no GPU, a few minutes of training",
    "cpu_hour": "no GPU, an hour of training on 2 cores",
    "colab_t4": "a Tesla T4 or another GPU below 20 GB",
    "rtx4090": "an RTX 4090 or another GPU of 20 to 47 GB",
    "h100": "an H100 or another GPU of 48 to 99 GB",
    "h200": "an H200 or another GPU from 100 GB",
}


def detect_machine(device_name="auto"):
    """The name in MACHINE_NAMES of what this device is: the CPU, or the class of its GPU by memory."""
    device = choose_device(device_name)
    if device.type != "cuda":
        return "cpu"
    gigabytes = torch.cuda.get_device_properties(device).total_memory / 1e9
    if gigabytes < 20:
        return "colab_t4"
    if gigabytes < 48:
        return "rtx4090"
    return "h100" if gigabytes < 100 else "h200"
