from pathlib import Path

import pytest

from quant_engine.errors import CorruptCheckpointError, SourceError
from quant_engine.loader import load_tokenizer
from quant_engine.source import resolve
from quant_engine.tokenizer_files import require_tokenizer
from tests.quant_engine.checkpoints import write_model


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "vocab.json", "a.tiktoken"]
)
def test_any_vocabulary_will_do(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    require_tokenizer(tmp_path)


def test_a_folder_without_one_is_named_with_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(SourceError, match=rf"^{tmp_path} has no tokenizer \(none of tokenizer\.json, .*; copy"):
        require_tokenizer(tmp_path)


def test_one_that_is_damaged_or_missing_is_refused_where_it_is_loaded(tmp_path: Path) -> None:
    source = resolve(write_model(tmp_path))
    with pytest.raises(CorruptCheckpointError, match=r"the tokenizer of .* cannot be read"):
        load_tokenizer(source)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="has no tokenizer"):
        load_tokenizer(source)
