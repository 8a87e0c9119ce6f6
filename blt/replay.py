"""Functions of arrays on a device; on CUDA recorded as CUDA graphs, so that a call is one launch instead of hundreds.

A step of generation is some 500 operations on a few numbers each. A GPU computes each of them faster than Python can
ask for it, so a step takes as long as the asking. A CUDA graph is asked for once.

    send(arrays, device)    NumPy arrays to a device, by one copy
    Replayed(function)      calls of function(tensors), recorded once for each set of shapes
"""

import numpy as np
import torch

# Each array begins at a multiple of this many bytes: enough for any dtype.
ALIGNMENT = 16


class Layout:
    """Where arrays lie in one buffer of bytes. Equal for arrays of equal names, shapes and dtypes."""

    def __init__(self, arrays):
        self.places = []
        self.n_bytes = 0
        for name, array in arrays.items():
            self.places.append((name, self.n_bytes, array.shape, array.dtype))
            self.n_bytes += -(-array.nbytes // ALIGNMENT) * ALIGNMENT

    def write(self, arrays, buffer):
        """Copy the arrays into a uint8 NumPy array of n_bytes."""
        for name, begin, shape, dtype in self.places:
            array = arrays[name]
            buffer[begin : begin + array.nbytes].view(dtype).reshape(shape)[...] = array

    def tensors(self, buffer):
        """{name: view} of a uint8 tensor of n_bytes."""
        views = {}
        for name, begin, shape, dtype in self.places:
            torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
            n_bytes = int(np.prod(shape)) * dtype.itemsize
            views[name] = buffer[begin : begin + n_bytes].view(torch_dtype).view(shape)
        return views


def send(arrays, device):
    """{name: NumPy array} as {name: tensor} on the device. A CPU's tensors share the arrays' memory."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    layout = Layout(arrays)
    buffer = np.empty(layout.n_bytes, np.uint8)
    layout.write(arrays, buffer)
    return layout.tensors(torch.from_numpy(buffer).to(device))


class Replayed:
    """function(tensors), called with arrays. Where `can_record` says so, its operations are recorded and replayed.

    The function must do the same operations for equal shapes of its arrays and equal addresses of whatever else it
    reads or writes: the tensors that buffers() returns. It may change these in place, but its second call with the
    same arrays must change nothing more. Its outputs are overwritten by the next call with equal shapes.
    """

    def __init__(self, function, device, buffers):
        self.function = function
        self.device = device
        self.buffers = buffers
        self.addresses = None
        self.recordings = {}

    def __call__(self, arrays, record=True):
        """What the function returns. record: whether calls like this one are frequent enough to be recorded."""
        if not record or not can_record(self.device):
            return self.function(send(arrays, self.device))
        addresses = [tensor.data_ptr() for tensor in self.buffers()]
        if addresses != self.addresses:
            # A cache has grown, and lies somewhere else now.
            self.recordings = {}
            self.addresses = addresses
        key = tuple((name, array.shape, array.dtype) for name, array in arrays.items())
        if key not in self.recordings:
            self.recordings[key] = Recording(self.function, arrays, self.device)
        return self.recordings[key](arrays)


class Recording:
    """The operations of function(tensors) for arrays of one set of shapes."""

    def __init__(self, function, arrays, device):
        self.layout = Layout(arrays)
        self.host = np.empty(self.layout.n_bytes, np.uint8)
        self.inputs = torch.empty(self.layout.n_bytes, dtype=torch.uint8, device=device)
        self._write(arrays)
        tensors = self.layout.tensors(self.inputs)
        self.replay, self.outputs = record_calls(lambda: function(tensors))

    def __call__(self, arrays):
        self._write(arrays)
        self.replay()
        return self.outputs

    def _write(self, arrays):
        self.layout.write(arrays, self.host)
        # Not from pinned memory, which the next call could change before it is copied.
        self.inputs.copy_(torch.from_numpy(self.host))


def can_record(device):
    """Whether calls on this device are worth recording: on CUDA."""
    return device.type == "cuda"


def record_calls(function):
    """Record the operations of function() as a CUDA graph: a function that does them again, and function's outputs."""
    # The first calls choose kernels and compile those of Triton, which a recording must not do.
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph.replay, outputs
