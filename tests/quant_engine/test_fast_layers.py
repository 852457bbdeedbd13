"""What takes the place of MLX's layers on a CPU computes the same."""

from pathlib import Path

import mlx.core as mx
import pytest

from quant_engine.config import QuantConfig
from quant_engine.convert import convert
from quant_engine.fast_layers import FastRMSNorm, FeedForward
from quant_engine.loader import load_source
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import write_model


@pytest.mark.parametrize("bits", [None, 3])
def test_a_fused_model_gives_what_one_of_single_layers_gives(tmp_path: Path, bits: int | None) -> None:
    path = write_model(tmp_path / "in")
    if bits:
        path = convert(path, tmp_path / "out", config=QuantConfig(bits=bits)).path
    fused, single = load_source(resolve(path)), load_source(resolve(path), fuse=False)
    kinds = [type(module) for module in fused.modules()]
    assert kinds.count(FeedForward) == 2
    assert kinds.count(FastRMSNorm) == 5
    assert FeedForward not in {type(module) for module in single.modules()}
    tokens = mx.array([[5, 6, 7]])
    assert mx.allclose(fused(tokens), single(tokens), rtol=1e-4, atol=1e-4)


def test_layers_with_a_correction_of_their_own_are_not_fused(tmp_path: Path) -> None:
    made = convert(write_model(tmp_path / "in"), tmp_path / "out", config=QuantConfig(use_qjl=True))
    assert FeedForward not in {type(module) for module in load_source(resolve(made.path)).modules()}
