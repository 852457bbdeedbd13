import errno
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError
from quant_engine.safetensors_file import (
    UNWRITTEN,
    SafetensorsWriter,
    TensorSpec,
    assign_shards,
    decode,
    file_bytes,
    index_json,
    read_header,
)

F32_2 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _file(path: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_tensors_of_mlx_files_are_read_as_mlx_reads_them(tmp_path: Path, dtype: mx.Dtype) -> None:
    tensors = {"a": mx.random.normal((5, 6)).astype(dtype), "b": mx.random.normal((3,)).astype(dtype)}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), tensors)
    found = read_header(tmp_path / "x.safetensors")
    assert {name: info.shape for name, info in found.items()} == {"a": (5, 6), "b": (3,)}
    assert mx.array_equal(found["a"].rows(0, 5), tensors["a"])
    assert mx.array_equal(found["a"].rows(2, 4), tensors["a"][2:4])
    assert found["a"].rows(2, 4).dtype == dtype
    whole = np.concatenate(list(found["b"].chunks()))
    assert mx.array_equal(decode(whole, found["b"].dtype), tensors["b"])


def test_a_tensor_is_handed_out_in_pieces_of_bounded_size(tmp_path: Path) -> None:
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"a": mx.zeros((3000, 2048))})
    sizes = [piece.nbytes for piece in read_header(tmp_path / "x.safetensors")["a"].chunks()]
    assert sum(sizes) == 3000 * 2048 * 4
    assert max(sizes) == 2**22


def test_empty_tensors_and_metadata_are_accepted(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]},
        "a": F32_2,
    }
    found = read_header(_file(tmp_path / "x.safetensors", header))
    assert set(found) == {"none", "a"}
    assert found["none"].rows(0, 0).shape == (0, 4)
    assert list(found["none"].chunks()) == []


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{nonsense", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": {}, "a": {}}', "names 'a' twice"),
        ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "tensor a lacks a dtype"),
        ({"a": 5}, "tensor a lacks a dtype"),
        ({"a": F32_2 | {"data_offsets": [0, 4, 8]}}, "tensor a lacks"),
        ({"a": F32_2 | {"dtype": "F99"}}, "unknown dtype 'F99'"),
        ({"a": F32_2 | {"shape": [-2]}}, r"shape \[-2\]"),
        ({"a": F32_2 | {"shape": [2.0]}}, r"shape \[2.0\]"),
        ({"a": F32_2 | {"shape": [3]}}, r"F32 \[3\] takes 12 bytes, and its offsets span 8"),
        ({"a": F32_2 | {"shape": [2**62, 4]}}, "offsets span 8"),
        ({"a": F32_2 | {"data_offsets": [8, 16]}}, "it is truncated"),
        ({"a": F32_2, "b": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}, "overlaps the one before it"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [6, 8]}}, "leaves a gap"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, "6 bytes follow its last tensor"),
        ({}, "8 bytes follow"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=f"^bad.safetensors is damaged: .*{message}.*download it again"):
        read_header(_file(tmp_path / "bad.safetensors", header))


@pytest.mark.parametrize("length", [10**6, 2**63, 200_000_000])
def test_a_header_longer_than_the_file_is_refused_before_it_is_read(tmp_path: Path, length: int) -> None:
    with pytest.raises(CorruptCheckpointError, match=f"cannot hold a header of {length}"):
        read_header(_file(tmp_path / "x.safetensors", {"a": F32_2}, length=length))


@pytest.mark.parametrize("size", [0, 3, 7, 8, 30, -1])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((4, 4))})
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CorruptCheckpointError, match=r"x\.safetensors is damaged"):
        read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones((4, 4))})
    info = read_header(path)["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CorruptCheckpointError, match="ends within tensor a"):
        info.rows(0, 4)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_with_the_tensors_name(
    tmp_path: Path, dtype: mx.Dtype, value: float
) -> None:
    mx.save_safetensors(
        str(tmp_path / "x.safetensors"), {"bad.weight": mx.array([[1.0, 2.0], [value, 3.0]]).astype(dtype)}
    )
    info = read_header(tmp_path / "x.safetensors")["bad.weight"]
    assert info.rows(0, 1).shape == (1, 2)
    with pytest.raises(CorruptCheckpointError, match=r"tensor bad\.weight of x\.safetensors has 1 NaN or infinite"):
        info.rows(0, 2)


def test_dtypes_that_are_not_weights_are_refused_by_name(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}
    info = read_header(_file(tmp_path / "x.safetensors", header))["a"]
    with pytest.raises(UnsupportedModelError, match=r"tensor a .* is F8_E4M3; weights must be F32, F16, BF16"):
        info.rows(0, 8)


SPECS = [TensorSpec("codes", "U32", (4, 3)), TensorSpec("norm", "BF16", (5,)), TensorSpec("scales", "F16", (4, 1))]


def _write(path: Path) -> None:
    with SafetensorsWriter(path, SPECS) as writer:
        writer.write("norm", mx.arange(5).astype(mx.bfloat16).view(mx.uint16))
        writer.write("codes", mx.arange(6, dtype=mx.uint32))
        writer.write("codes", np.arange(6, 12, dtype=np.uint32).reshape(2, 3))
        writer.write("scales", mx.ones((4, 1), dtype=mx.float16))


def test_a_written_file_is_what_mlx_reads_and_as_large_as_foretold(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    _write(path)
    assert path.stat().st_size == file_bytes(SPECS)
    read = mx.load(str(path))
    assert isinstance(read, dict)
    assert mx.array_equal(read["codes"], mx.arange(12, dtype=mx.uint32).reshape(4, 3))
    assert mx.array_equal(read["norm"], mx.arange(5).astype(mx.bfloat16))
    assert read["scales"].dtype == mx.float16
    assert set(read_header(path)) == {"codes", "norm", "scales"}


def test_bfloat16_is_written_bit_for_bit_and_packed_words_are_read_by_rows(tmp_path: Path) -> None:
    values, words = mx.random.normal((3, 4)).astype(mx.bfloat16), mx.arange(12, dtype=mx.uint32).reshape(2, 3, 2)
    specs = [TensorSpec("values", "BF16", (3, 4)), TensorSpec("words", "U32", (2, 3, 2))]
    with SafetensorsWriter(tmp_path / "f.safetensors", specs) as writer:
        writer.write("values", values)
        writer.write("words", words)
    assert mx.array_equal(mx.load(str(tmp_path / "f.safetensors"))["values"], values)
    rows = read_header(tmp_path / "f.safetensors")["words"].words(2, 5)
    assert rows.dtype == mx.uint32 and mx.array_equal(rows, words.reshape(6, 2)[2:5])


def test_every_tensor_is_aligned_to_its_dtype(tmp_path: Path) -> None:
    _write(tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")
    assert found["codes"].start % 8 == 0
    assert all(info.start % 2 == 0 for info in found.values())


def test_the_writer_refuses_what_was_not_announced_or_not_finished(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="8 bytes for tensor other of a, which has room for 0"),
        SafetensorsWriter(tmp_path / "a", SPECS) as writer,
    ):
        writer.write("other", np.zeros(2, np.float32))
    with (
        pytest.raises(ValueError, match="12 bytes for tensor norm"),
        SafetensorsWriter(tmp_path / "b", SPECS) as writer,
    ):
        writer.write("norm", np.zeros(6, np.uint16))
    with (
        pytest.raises(ValueError, match="tensors codes, norm, scales of c were not written whole"),
        SafetensorsWriter(tmp_path / "c", SPECS),
    ):
        pass


def test_threads_write_the_same_file(tmp_path: Path) -> None:
    pieces = [np.full(1000, number, np.uint32) for number in range(50)]
    with ThreadPoolExecutor(4) as pool:
        for path, writing in ((tmp_path / "a", None), (tmp_path / "b", pool)):
            with SafetensorsWriter(path, [TensorSpec("x", "U32", (50, 1000))], writing) as writer:
                for piece in pieces:
                    writer.write("x", piece if writing is None else mx.array(piece))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("threads", [0, 2])
def test_whoever_asks_is_told_how_much_of_a_file_is_whole(tmp_path: Path, threads: int) -> None:
    path, told = tmp_path / "x", list[int]()
    with (
        ThreadPoolExecutor(2) as pool,
        SafetensorsWriter(path, SPECS, pool if threads else None, told.append) as writer,
    ):
        writer.write("scales", np.ones((4, 1), np.float16))
        writer.write("codes", np.ones((4, 3), np.uint32))
        writer.write("norm", np.ones(5, np.uint16))
    codes, end = read_header(path)["codes"], path.stat().st_size
    assert told == [codes.start, codes.start, codes.end, end]
    with ThreadPoolExecutor(2) as pool, SafetensorsWriter(tmp_path / "y", [], pool, told.append):
        pass
    assert told[-1] == (tmp_path / "y").stat().st_size


def test_an_error_of_a_thread_that_writes_comes_at_a_later_piece_or_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "pwrite", full)
    for count in (1, 50):
        written: list[int] = []
        with ThreadPoolExecutor(2) as pool, pytest.raises(OSError, match="no space"):
            specs = [TensorSpec("x", "U8", (count,))]
            with SafetensorsWriter(tmp_path / str(count), specs, pool) as writer:
                for number in range(count):
                    writer.write("x", np.zeros(1, np.uint8))
                    written.append(number)
        assert len(written) <= UNWRITTEN


def test_shards_fill_up_to_the_limit_and_keep_groups_together() -> None:
    groups = [[TensorSpec(f"{i}.a", "U8", (60,)), TensorSpec(f"{i}.b", "U8", (20,))] for i in range(3)]
    shards = assign_shards(groups, 170)
    assert {name: [s.name for s in shard] for name, shard in shards.items()} == {
        "model-00001-of-00002.safetensors": ["0.a", "0.b", "1.a", "1.b"],
        "model-00002-of-00002.safetensors": ["2.a", "2.b"],
    }
    assert json.loads(index_json(shards)) == {
        "metadata": {"total_size": 240},
        "weight_map": {s.name: name for name, shard in shards.items() for s in shard},
    }
    assert list(assign_shards(groups, 1000)) == ["model.safetensors"]
    assert [len(shard) for shard in assign_shards(groups, 10).values()] == [2, 2, 2]
