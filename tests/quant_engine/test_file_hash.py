import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quant_engine import file_hash
from quant_engine.file_hash import RunningHash, file_sha256
from quant_engine.safetensors_file import SafetensorsWriter, TensorSpec


def write_followed(path: Path, order: list[int]) -> str:
    """The running hash of a file of three tensors whose pieces, of 40 KB each, come in this order."""
    specs = [TensorSpec(str(number), "U32", (10, 10_000)) for number in range(3)]
    with ThreadPoolExecutor(4) as pool:
        running = RunningHash(path, pool)
        with SafetensorsWriter(path, specs, pool, running.whole) as writer:
            for number in order:
                writer.write(str(number), np.random.default_rng(number).integers(2**32, size=10_000, dtype=np.uint32))
        return pool.submit(running.finish).result()


@pytest.mark.parametrize("stretch", [2**14, 2**16, 2**26])
def test_the_hash_of_a_file_that_is_written_is_that_of_the_whole_whatever_the_order_of_pieces(
    tmp_path: Path, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_hash, "HASHED_BYTES", min(stretch, 2**14))
    monkeypatch.setattr(file_hash, "FLUSHED_BYTES", stretch)
    in_order = [number for number in range(3) for _ in range(10)]
    for name, order in (("a", in_order), ("b", in_order[::-1]), ("c", [0, 1, 2] * 10)):
        assert write_followed(tmp_path / name, order) == file_sha256(tmp_path / name)


def test_what_is_whole_is_hashed_while_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_hash, "HASHED_BYTES", 2**14)
    monkeypatch.setattr(file_hash, "FLUSHED_BYTES", 2**14)
    path = tmp_path / "x"
    path.write_bytes(b"a" * 10 * 2**14)
    with ThreadPoolExecutor(1) as pool:
        running = RunningHash(path, pool)
        pool.submit(bool).result()
        running.whole(9 * 2**14 + 5)
        pool.submit(bool).result()
        with path.open("r+b") as file:
            file.write(b"b" * 9 * 2**14)  # is not seen any more
        running.whole(10 * 2**14)
        assert running.finish() != file_sha256(path)
        path.write_bytes(b"a" * 10 * 2**14)
        assert running.finish() == file_sha256(path)


def test_an_error_of_the_thread_that_follows_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(file_hash, "FLUSHED_BYTES", 2**23)
    (tmp_path / "x").write_bytes(b"a" * 3 * 2**23)
    with ThreadPoolExecutor(1) as pool:
        for calls in (1, 2):
            running = RunningHash(tmp_path / "x", pool)
            with pytest.raises(OSError, match="no space"):
                for count in range(1, calls + 1):
                    pool.submit(bool).result()
                    running.whole(count * 2**23)
                running.finish()
