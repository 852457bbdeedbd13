"""Kernels of every backend (Metal, CUDA, CPU), behind operations that take and return MLX arrays."""

from metal_kernels.activation import swiglu
from metal_kernels.attention import (
    CacheCode,
    Mask,
    attention,
    attention_rows,
    gpu_codes,
    pack_cache,
    pack_cache_rows,
    packed_attention,
    packed_attention_rows,
    unpack_cache,
)
from metal_kernels.compilation import announce_compilation
from metal_kernels.cpu.arrays import view as writable
from metal_kernels.cpu.finite import count_not_finite
from metal_kernels.cpu.heads import HeadNorms
from metal_kernels.decoder_layer import Attend, DecoderLayer, Turns, decoder_layer
from metal_kernels.dispatch import (
    BACKENDS,
    Backend,
    active_backend,
    device,
    has_kernel,
    kernel_path,
    reset_paths,
    use_backend,
)
from metal_kernels.errors import KernelError, ShapeError
from metal_kernels.experts import Experts, expert_matmul
from metal_kernels.feed_forward import feed_forward
from metal_kernels.gpu.decode_attention import WAITING, Codes, Heads
from metal_kernels.gpu.decode_attention import fits as decode_attention_fits
from metal_kernels.gpu.decoder_layer import CompiledDecoding, CompiledLayer, Held, TileLayer, position
from metal_kernels.gpu.products import Gpu
from metal_kernels.gpu.turned_product import Norm
from metal_kernels.hadamard import rotate, unrotate
from metal_kernels.layout import HADAMARD_FACTORS, bits_of, groups, hadamard_block, pack, unpack, words
from metal_kernels.matmul import AffineWeight, DenseWeight, PackedWeight, Weight, embed, matmul, split, tiles_of
from metal_kernels.norm import rms_norm
from metal_kernels.quantize import dequantize, quantize

__all__ = [
    "BACKENDS",
    "HADAMARD_FACTORS",
    "WAITING",
    "AffineWeight",
    "Attend",
    "Backend",
    "CacheCode",
    "Codes",
    "CompiledDecoding",
    "CompiledLayer",
    "DecoderLayer",
    "DenseWeight",
    "Experts",
    "Gpu",
    "HeadNorms",
    "Heads",
    "Held",
    "KernelError",
    "Mask",
    "Norm",
    "PackedWeight",
    "ShapeError",
    "TileLayer",
    "Turns",
    "Weight",
    "active_backend",
    "announce_compilation",
    "attention",
    "attention_rows",
    "bits_of",
    "count_not_finite",
    "decode_attention_fits",
    "decoder_layer",
    "dequantize",
    "device",
    "embed",
    "expert_matmul",
    "feed_forward",
    "gpu_codes",
    "groups",
    "hadamard_block",
    "has_kernel",
    "kernel_path",
    "matmul",
    "pack",
    "pack_cache",
    "pack_cache_rows",
    "packed_attention",
    "packed_attention_rows",
    "position",
    "quantize",
    "reset_paths",
    "rms_norm",
    "rotate",
    "split",
    "swiglu",
    "tiles_of",
    "unpack",
    "unpack_cache",
    "unrotate",
    "use_backend",
    "words",
    "writable",
]
