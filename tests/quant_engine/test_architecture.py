from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from quant_engine.architecture import describe
from quant_engine.errors import CorruptCheckpointError, UnsupportedModelError
from quant_engine.parameters import Parameters
from quant_engine.source import resolve
from tests.quant_engine.checkpoints import CONFIG, LINEAR, shapes, write_model


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_parameters_are_named_as_transformers_names_them(model_type: str) -> None:
    config = CONFIG | {"model_type": model_type}
    found = describe(config)
    assert found.parameters == shapes(config)
    assert set(found.linear) == {f"model.layers.{i}.{path}" for i in (0, 1) for path in LINEAR} | {"lm_head"}


def test_architectures_that_mlx_lm_lacks_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type 'nonsense' is none that mlx-lm has a model for"):
        describe(CONFIG | {"model_type": "nonsense"})


def test_a_config_without_model_type_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="model_type None"):
        describe({})


@pytest.mark.parametrize("change", [{"hidden_size": None}, {"num_hidden_layers": "two"}])
def test_a_config_that_describes_no_model_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptCheckpointError, match="does not describe a llama model"):
        describe(CONFIG | change)


def _without(made: dict[str, mx.array], *names: str) -> dict[str, mx.array]:
    return {name: array for name, array in made.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda made: _without(made, "model.norm.weight", "lm_head.weight"),
            "2 tensors are missing, the first lm_head",
        ),
        (lambda made: made | {"visual.patch": mx.ones(3)}, r"1 do not belong to it, the first visual\.patch"),
        (
            lambda made: made | {"model.norm.weight": mx.ones(64)},
            r"model\.norm\.weight is \[64\] and the config makes it \[128\]",
        ),
    ],
)
def test_weights_that_contradict_the_config_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    source = resolve(write_model(tmp_path, weights=change))
    with pytest.raises(CorruptCheckpointError, match=message):
        describe(source.config).check(Parameters(source.config, source.tensors))
