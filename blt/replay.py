"""Functions of arrays on a device; on CUDA recorded as CUDA graphs, so that a call is one launch instead of hundreds.

A step of generation is some 500 operations on a few numbers each. A GPU computes each of them faster than Python can
ask for it, so a step takes as long as the asking. A CUDA graph holds all of them, and is one launch.

    send(arrays, device)    NumPy arrays to a device, by one copy
    Replayed(device)        calls of function(tensors), recorded once for each set of shapes
"""

from functools import cache

import numpy as np
import torch

# Each array begins at a multiple of this many bytes: enough for any dtype.
ALIGNMENT = 16


class Layout:
    """Where arrays lie in one buffer of bytes. It depends on their names, shapes and dtypes only."""

    def __init__(self, arrays):
        self.spans = []
        self.n_bytes = 0
        for name, array in arrays.items():
            self.spans.append((name, self.n_bytes, array.shape, array.dtype))
            self.n_bytes += -(-array.nbytes // ALIGNMENT) * ALIGNMENT

    def pack(self, arrays, device):
        """The arrays in a uint8 tensor of n_bytes on the CPU, from where they can go to the device.

        On CUDA in pinned memory, so that the CPU need not wait for the copy. torch does not use the
        memory again before the copy is done.
        """
        buffer = torch.empty(self.n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        bytes_of_buffer = buffer.numpy()
        for name, begin, shape, dtype in self.spans:
            array = arrays[name]
            bytes_of_buffer[begin : begin + array.nbytes].view(dtype).reshape(shape)[...] = array
        return buffer

    def tensors(self, buffer):
        """{name: view} of a uint8 tensor of n_bytes."""
        views = {}
        for name, begin, shape, dtype in self.spans:
            torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
            n_bytes = int(np.prod(shape)) * dtype.itemsize
            views[name] = buffer[begin : begin + n_bytes].view(torch_dtype).view(shape)
        return views


def send(arrays, device):
    """{name: NumPy array} as {name: tensor} on the device. A CPU's tensors share the arrays' memory."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    layout = Layout(arrays)
    return layout.tensors(layout.pack(arrays, device).to(device, non_blocking=device.type == "cuda"))


class Replayed:
    """Calls of functions of arrays, whose operations are recorded and replayed where that is worth it.

    A function must do the same operations for equal shapes of its arrays and equal addresses of whatever
    else it reads or writes: `buffers`, and the model's weights, which must stay where they are. It may
    change buffers in place. Recording calls it several times with the same arrays, so a second call must
    change nothing more. The outputs of a replay are overwritten by the next call with equal shapes.
    """

    def __init__(self, device):
        self.device = device
        self.addresses = None
        self.recordings = {}  # by shapes; None: they have occurred once

    def __call__(self, function, arrays, buffers, record):
        """What function(tensors of the arrays) returns.

        function: the same in every call. It is not kept: it may belong to the owner of this object.
        buffers: the tensors that it reads or writes beside its arrays.
        record: whether calls like this one are frequent enough to be recorded, the second time they occur.
        """
        if not record:
            return function(send(arrays, self.device))
        addresses = [(tensor.data_ptr(), tensor.shape) for tensor in buffers]
        if addresses != self.addresses:
            # A cache has grown, and lies somewhere else now.
            self.recordings = {}
            self.addresses = addresses
        key = tuple((name, array.shape, array.dtype) for name, array in arrays.items())
        if key not in self.recordings:
            # Some shapes occur once only. The first call also allocates what has been missing.
            self.recordings[key] = None
            return function(send(arrays, self.device))
        if self.recordings[key] is None:
            self.recordings[key] = Recording(function, arrays, self.device)
        return self.recordings[key](arrays)


class Recording:
    """The operations of function(tensors) for arrays of one set of shapes."""

    def __init__(self, function, arrays, device):
        self.layout = Layout(arrays)
        self.inputs = torch.empty(self.layout.n_bytes, dtype=torch.uint8, device=device)
        self._write(arrays)
        tensors = self.layout.tensors(self.inputs)
        self.replay, self.outputs = record_calls(lambda: function(tensors), device)

    def __call__(self, arrays):
        self._write(arrays)
        self.replay()
        return self.outputs

    def _write(self, arrays):
        device = self.inputs.device
        self.inputs.copy_(self.layout.pack(arrays, device), non_blocking=device.type == "cuda")


def can_record(device):
    """Whether calls on this device are worth recording: on CUDA."""
    return device.type == "cuda"


@cache
def side_stream(device):
    """The stream on which a device's recordings are made. One only: torch keeps a workspace for each."""
    return torch.cuda.Stream(device)


def record_calls(function, device):
    """Record the operations of function() as a CUDA graph: a function that does them again, and function's outputs."""
    # Streams and graphs are those of the current device, wherever the tensors are.
    with torch.cuda.device(device):
        stream = side_stream(device)
        # The first calls choose kernels and compile those of Triton, which a recording must not do.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = function()
    return graph.replay, outputs
