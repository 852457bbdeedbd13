"""Uploading a converted model to the Hugging Face Hub, with a card that holds what was measured."""

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from quant_engine.errors import InputError, SourceError
from registry import EvaluationRecord

CARD = "README.md"
HEADING = "## Measured"


def check_repo(repo: str) -> None:
    """Raise InputError unless `repo` is owner/name as the Hub spells it."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is no repository name: {error}") from error
    if repo.count("/") != 1:
        raise InputError(f"{repo!r} is no repository name; give owner/name")


def card_with_measurements(card: str, evaluations: Sequence[EvaluationRecord]) -> str:
    """The card with a table of the newest evaluations on each text; as it is where there are none."""
    kept = card.partition(f"\n{HEADING}\n")[0].rstrip()
    newest = {(e.dataset_sha256, e.seq_len, e.windows, e.method, e.bits): e for e in evaluations}
    if not newest:
        return kept + "\n"
    lines = [
        "| text | windows | weights | bits a weight | perplexity | KL divergence | same first choice |",
        "|---|---|---|---|---|---|---|",
        *(_line(e) for e in newest.values()),
    ]
    return "\n".join([kept, "", HEADING, "", *lines, ""])


def _line(e: EvaluationRecord) -> str:
    stderr = "" if e.ppl_stderr is None else f" ± {e.ppl_stderr:.2f}"
    cells = [
        e.dataset,
        f"{e.windows} × {e.seq_len}",
        e.method,
        "" if e.bits_per_weight is None else f"{e.bits_per_weight:.2f}",
        f"{e.ppl:.2f}{stderr}",
        "" if e.kl is None else f"{e.kl:.4f}",
        "" if e.top1 is None else f"{e.top1:.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


def upload(folder: Path, files: Sequence[str], card: str, repo: str, *, private: bool) -> str:
    """Upload files of a folder, and a card, in one commit; return its address. A repository that is missing is made.

    Raises SourceError where the Hub refuses or cannot be reached.
    """
    operations = [CommitOperationAdd(name, str(folder / name)) for name in files]
    operations.append(CommitOperationAdd(CARD, card.encode()))
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message="TurboQuant model with its measurements")
    except LocalTokenNotFoundError as error:
        raise SourceError(f"no Hugging Face token on this machine, and {repo} needs one: hf auth login") from error
    except HfHubHTTPError as error:
        raise SourceError(f"the Hub refused the upload to {repo}: {error}; nothing was published") from error
    except OSError as error:
        raise SourceError(f"the upload to {repo} stopped: {error}; run it again, finished files are kept") from error
    return commit.commit_url
