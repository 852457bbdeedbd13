"""Write the figures of training.json into the demo model's card, between its markers."""

import argparse
import json
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "tq_mcp" / "demo_model"


def table(record: dict) -> str:
    recall = ", ".join(f"{share:.0%} at {tokens} tokens" for tokens, share in record["recall"].items())
    rows = [
        ("repeat it with", f"`--steps {record['steps']} --seed {record['seed']}`"),
        (
            "tokens seen",
            f"{record['tokens_seen'] / 1e9:.2f} billion, of {record['train_tokens'] / 1e6:.1f} million",
        ),
        ("rows in a batch × tokens in a row", f"{record['rows']} × {record['length']}"),
        ("peak learning rate", f"{record['learning_rate']:g}"),
        (
            "time and machine",
            f"{record['seconds'] / 60:.1f} minutes on {record['device']}, torch {record['torch']}",
        ),
        ("held-out perplexity", f"{record['held_out_perplexity']:.2f} a token"),
        ("held-out bits per byte", f"{record['held_out_bits_per_byte']:.3f}"),
        ("facts recalled", recall),
        ("training text, sha256", f"`{record['data_sha256']}`"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def fill(card: str, record: dict) -> str:
    """The card with its table written anew; raises ValueError where it has no markers."""
    block = f"<!-- training:begin -->\n{table(record)}\n<!-- training:end -->"
    card, found = re.subn("<!-- training:begin -->.*<!-- training:end -->", lambda _: block, card, flags=re.S)
    if not found:
        raise ValueError("the card has no training:begin and training:end markers: put them where the table belongs")
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("--folder", type=Path, default=FOLDER, help="holds training.json and README.md")
    folder = parser.parse_args().folder
    record = json.loads((folder / "training.json").read_text())
    (folder / "README.md").write_text(fill((folder / "README.md").read_text(), record))


if __name__ == "__main__":
    main()
