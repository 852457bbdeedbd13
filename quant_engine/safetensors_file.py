"""Safetensors files, read and written with bounded memory, and trusted in nothing before it is checked.

A file is a little-endian 64-bit header length, a JSON header of dtype, shape and byte range by tensor name,
and the tensors' bytes, which fill the rest of the file without gaps.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metal_kernels import count_not_finite
from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError

SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one value of each dtype in the format."""

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16)}
"""Float dtypes that weights may have, as NumPy holds them: bfloat16 as the uint16 of its bits."""

MAX_HEADER_BYTES = 100_000_000
CHUNK_BYTES = 2**22
UNWRITTEN = 4
"""Pieces of a file that wait to be written, at most."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, dtype name, shape, and byte range in the file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start

    @property
    def width(self) -> int:
        """Values of a row; a number is a row of one."""
        return self.shape[-1] if self.shape else 1

    def rows(self, first: int, last: int, raw: NDArray[np.uint8] | None = None) -> mx.array:
        """Rows [first, last) of a float tensor as a matrix, all axes but the last as one, from `raw` or read now.

        Raises as `raw_rows` does.
        """
        if raw is None:
            raw = self.raw_rows(first, last)
        return decode(raw, self.dtype).reshape(last - first, self.width)

    def raw_rows(self, first: int, last: int) -> NDArray[np.uint8]:
        """The bytes of rows [first, last) of a float tensor, read now, in any thread.

        Raises UnsupportedModelError for dtypes that are not F32, F16 or BF16, CorruptCheckpointError for NaN
        or infinite values and where the file ends early.
        """
        if self.dtype not in FLOATS:
            raise UnsupportedModelError(
                f"tensor {self.name} of {self.path.name} is {self.dtype}; weights must be "
                f"{', '.join(FLOATS)}: convert from the original, unquantized model"
            )
        raw = self._read_rows(first, last)
        check_finite(raw, self)
        return raw

    def words(self, first: int, last: int) -> mx.array:
        """As `rows`, for a U32 tensor: packed codes or signs."""
        return mx.array(self._read_rows(first, last).view(np.uint32)).reshape(last - first, self.width)

    def _read_rows(self, first: int, last: int) -> NDArray[np.uint8]:
        row = self.width * SIZES[self.dtype]
        return self._read(self.start + first * row, (last - first) * row)

    def chunks(self) -> Iterator[NDArray[np.uint8]]:
        """The tensor's bytes in pieces of at most 4 MB, checked as `chunk` does."""
        return map(self.chunk, self.chunk_starts)

    @property
    def chunk_starts(self) -> range:
        """Where in the file each of `chunks` begins."""
        return range(self.start, self.end, CHUNK_BYTES)

    def chunk(self, start: int) -> NDArray[np.uint8]:
        """The piece that begins at `start`, read now, in any thread.

        Raises CorruptCheckpointError for NaN or infinite values and where the file ends early.
        """
        raw = self._read(start, min(CHUNK_BYTES, self.end - start))
        check_finite(raw, self)
        return raw

    def _read(self, start: int, size: int) -> NDArray[np.uint8]:
        buffer = np.empty(size, np.uint8)
        view = buffer.data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(start)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CorruptCheckpointError(
                        f"{self.path.name} ends within tensor {self.name}; it changed while it "
                        "was read: download it again"
                    )
                view = view[count:]
        return buffer


def decode(raw: NDArray[np.uint8], dtype: str) -> mx.array:
    """The bytes of a float tensor, or a piece of one, as a flat mx.array of its dtype, one of FLOATS."""
    values = mx.array(raw.view(FLOATS[dtype]))
    return values.view(mx.bfloat16) if dtype == "BF16" else values


def check_finite(raw: NDArray[np.uint8], info: TensorInfo) -> None:
    """Raise CorruptCheckpointError where the bytes of a float tensor hold NaN or an infinity."""
    words = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}
    if info.dtype not in words:
        return
    word, exponent = words[info.dtype]
    bad = count_not_finite(raw.view(word), exponent)
    if bad:
        raise CorruptCheckpointError(
            f"tensor {info.name} of {info.path.name} has {bad} NaN or infinite values; the "
            "checkpoint is damaged: download it again, or report it to its author"
        )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file by name, every claim of the header checked against the file's size.

    Raises CorruptCheckpointError, naming the file and what is wrong with it.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _corrupt(path, f"its {size} bytes cannot hold a header of {length}")
        text = file.read(length)
    header = _parse(path, text)
    return check_header(path, {n: entry for n, entry in header.items() if n != "__metadata__"}, 8 + length, size)


def check_header(path: Path, entries: Mapping[str, Any], data: int, size: int) -> dict[str, TensorInfo]:
    """The tensors that a header's entries state, of a file of `size` bytes whose tensors begin at byte `data`.

    The file itself is not read. Raises CorruptCheckpointError as `read_header` does.
    """
    tensors = {name: _tensor(path, name, entry, data) for name, entry in entries.items()}
    _check_coverage(path, list(tensors.values()), data, size)
    return tensors


def _corrupt(path: Path, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{path.name} is damaged: {what}; download it again")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise _corrupt(path, f"its header names {twice!r} twice")
        return dict(pairs)

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    return cast(dict[str, Any], header)


def _tensor(path: Path, name: str, entry: Any, data: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _corrupt(path, f"tensor {name} lacks a dtype, shape or two data_offsets") from error
    if dtype not in SIZES:
        raise _corrupt(path, f"tensor {name} has the unknown dtype {dtype!r}")
    if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
        raise _corrupt(path, f"tensor {name} has shape {list(shape)} and offsets [{start}, {end}]")
    if math.prod(shape) * SIZES[dtype] != end - start:
        raise _corrupt(
            path,
            f"tensor {name} of {dtype} {list(shape)} takes {math.prod(shape) * SIZES[dtype]} bytes, "
            f"and its offsets span {end - start}",
        )
    return TensorInfo(path, name, dtype, shape, data + start, data + end)


def _check_coverage(path: Path, tensors: list[TensorInfo], data: int, size: int) -> None:
    """Tensors must follow each other without gap or overlap, from the header to the end of the file."""
    position = data
    for info in sorted(tensors, key=lambda t: (t.start, t.end)):
        if info.end > size:
            raise _corrupt(path, f"tensor {info.name} ends at byte {info.end} of a file of {size}: it is truncated")
        if info.start != position:
            fault = "overlaps the one before it" if info.start < position else "leaves a gap before it"
            raise _corrupt(path, f"tensor {info.name} {fault}")
        position = info.end
    if position != size:
        raise _corrupt(path, f"{size - position} bytes follow its last tensor")


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: name, dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * SIZES[self.dtype]


def header_bytes(tensors: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """A file's first bytes, padded to a multiple of 8, and each tensor's position in the file.

    Wider dtypes come first, so that every tensor is aligned to its dtype; else they stay in order.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    offsets: dict[str, int] = {}
    position = 0
    for spec in sorted(tensors, key=lambda t: -SIZES[t.dtype]):
        span = [position, position + spec.nbytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
        offsets[spec.name] = position
        position = span[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in offsets.items()}


def file_bytes(tensors: Sequence[TensorSpec]) -> int:
    """Exact size of a file of these tensors."""
    return len(header_bytes(tensors)[0]) + sum(spec.nbytes for spec in tensors)


class SafetensorsWriter:
    """Writes one file of tensors that are all announced first; their bytes come in any order, in pieces.

    With a `pool`, its threads write while the next pieces come. An error of theirs is raised by a later call, or when
    the block ends. whole: told up to which position all bytes are written, as it moves on.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[TensorSpec],
        pool: Executor | None = None,
        whole: Callable[[int], object] = bool,
    ) -> None:
        header, self._positions = header_bytes(tensors)
        self._left = {spec.name: spec.nbytes for spec in tensors}
        self._order = deque(sorted(self._left, key=lambda name: self._positions[name]))
        self._name = path.name
        self._pool, self._whole = pool, whole
        self._unwritten: deque[tuple[Future[None], int]] = deque()
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115
        self._put(header, 0)

    def write(self, name: str, piece: NDArray[Any] | mx.array) -> None:
        """Append bytes to a tensor. Raises ValueError where it was announced smaller, or not at all."""
        if isinstance(piece, mx.array) and piece.dtype == mx.bfloat16:
            piece = piece.view(mx.uint16)  # NumPy has no bfloat16
        # MLX's memory is not to be let go of in another thread.
        array: NDArray[Any] = np.array(piece, copy=True if self._pool and isinstance(piece, mx.array) else None)
        raw: NDArray[np.uint8] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if raw.nbytes > self._left.get(name, 0):
            raise ValueError(
                f"{raw.nbytes} bytes for tensor {name} of {self._name}, which has room for {self._left.get(name, 0)}"
            )
        position = self._positions[name]
        self._positions[name] += raw.nbytes
        self._left[name] -= raw.nbytes
        self._put(raw.data, position)

    def _put(self, data: bytes | memoryview, position: int) -> None:
        while len(self._order) > 1 and not self._left[self._order[0]]:
            self._order.popleft()
        whole = self._positions[self._order[0]] if self._order else position + len(data)
        if self._pool is None:
            self._write(data, position)
            self._whole(whole)
            return
        self._unwritten.append((self._pool.submit(self._write, data, position), whole))
        self._settle(UNWRITTEN)

    def _settle(self, count: int) -> None:
        """Wait until at most `count` pieces are unwritten."""
        while len(self._unwritten) > count:
            written, whole = self._unwritten.popleft()
            written.result()
            self._whole(whole)

    def _write(self, data: bytes | memoryview, position: int) -> None:
        view = memoryview(data)
        while view:
            count = os.pwrite(self._file.fileno(), view, position)
            view, position = view[count:], position + count

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is left; raises ValueError where announced tensors were not written whole."""
        with self._file:
            wait([written for written, _ in self._unwritten])
            if kind is not None:
                return
            self._settle(0)
            unfinished = [name for name, left in self._left.items() if left]
            if unfinished:
                raise ValueError(f"tensors {', '.join(unfinished)} of {self._name} were not written whole")


def assign_shards(groups: Sequence[Sequence[TensorSpec]], max_bytes: int) -> dict[str, list[TensorSpec]]:
    """File names and their tensors, in order, each file of at most max_bytes unless one group is larger.

    groups: tensors that must be in one file.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for group in groups:
        size = sum(spec.nbytes for spec in group)
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].extend(group)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_json(shards: Mapping[str, Sequence[TensorSpec]]) -> str:
    """The text of model.safetensors.index.json."""
    total = sum(spec.nbytes for shard in shards.values() for spec in shard)
    where = {spec.name: name for name, shard in shards.items() for spec in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"
