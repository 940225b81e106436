"""What too little memory looks like, on the device or on the CPU."""

from __future__ import annotations

import torch

# What a RuntimeError says that is one of too little memory: PyTorch's own, CUDA's and Triton's ("CUDA error: out of
# memory", "Triton Error [CUDA]: out of memory"), and those of cuBLAS, which allocates when it is first used.
_SIGNS = (
    "can't allocate memory",
    "std::bad_alloc",
    "can't start new thread",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, numpy, a library of the GPU or a thread to be started found too little memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in _SIGNS)
