"""The files of a tokenizer, without which a model can neither read a prompt nor be measured."""

from pathlib import Path

from quant_engine.errors import SourceError

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tokenizer.model.v*", "vocab.json", "vocab.txt", "*.tiktoken")
"""Names of files that hold a vocabulary; every tokenizer has one of them."""


def require_tokenizer(folder: Path) -> None:
    """Raise SourceError where a model's folder has no tokenizer."""
    if not any(file.is_file() for pattern in VOCABULARIES for file in folder.glob(pattern)):
        raise SourceError(
            f"{folder} has no tokenizer (none of {', '.join(VOCABULARIES)}); copy tokenizer.json or what else the "
            "model's repository has of these, and tokenizer_config.json, into the folder"
        )
