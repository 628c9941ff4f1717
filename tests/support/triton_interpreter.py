"""Run Triton kernels on CPU by Triton's own interpreter, inside jit, in the place of jax-triton."""

import os
import threading

import jax
import numpy as np

os.environ["TRITON_INTERPRET"] = "1"  # read by Triton when it is imported
ONE_AT_A_TIME = (
    threading.Lock()
)  # the interpreter holds its place in the grid in globals; XLA has many threads


class Storage:
    """A NumPy array with as much of a torch tensor and its storage as the interpreter asks for."""

    def __init__(self, array):
        self.array, self.dtype = array, array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, size, device):
        del size, device
        return Storage(self.array)

    def set_(self, storage, offset, size, stride):
        del offset, size, stride
        self.array = storage.array

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def copy_(self, other):
        assert other.array is self.array


def call(kernel, *arrays, outputs, grid, **constants):
    """Stand in for `fastvi.experimental.triton_calls.call`."""

    def run(*arrays):
        inputs = [np.array(array) for array in arrays]
        results = [np.full(output.shape, np.nan, output.dtype) for output in outputs]
        # an empty array has no address
        padded = [
            Storage(pointer if pointer.size else np.zeros(1, pointer.dtype))
            for pointer in inputs + results
        ]
        with ONE_AT_A_TIME:
            kernel.run(*padded, grid=grid, warmup=False, **constants)
        return tuple(results)

    return jax.pure_callback(run, tuple(outputs), *arrays)
