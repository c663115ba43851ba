"""Fast operations behind plain functions: convolution by FFT, softplus, fused element-wise functions."""

from crbp.ops.convolution import Conv2d, conv2d, preferred_method, shared_spectra
from crbp.ops.fused import Fused, compile_seconds, repeated_products
from crbp.ops.memory import keep_freed_memory
from crbp.ops.pointwise import softplus

__all__ = [
    "Conv2d",
    "Fused",
    "compile_seconds",
    "conv2d",
    "keep_freed_memory",
    "preferred_method",
    "repeated_products",
    "shared_spectra",
    "softplus",
]
