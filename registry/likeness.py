"""Were results measured alike? Only then may their numbers be ranked."""

from collections.abc import Iterable

from registry.records import EvaluationRecord

CONDITIONS = ("dataset_sha256", "seq_len", "windows", "tokens", "device")


def differences(evaluations: Iterable[EvaluationRecord]) -> tuple[str, ...]:
    """One sentence for each condition that is not the same in all; empty if all were measured alike."""
    records = tuple(evaluations)
    found: list[str] = []
    for condition in CONDITIONS:
        values = sorted({str(getattr(record, condition)) for record in records})
        if len(values) > 1:
            shown = ", ".join(value[:12] or "unknown" for value in values[:4])
            found.append(f"Not measured alike: {condition} is {shown}.")
    return tuple(found)
