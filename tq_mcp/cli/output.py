"""What people and programs read: tables or JSON on stdout, failures on stderr."""

import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from pydantic import BaseModel
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tq_mcp import schemas
from tq_mcp.untrusted import clean

PIPED_WIDTH = 160
FAILED = 1

R = TypeVar("R", bound=BaseModel)
Show = Callable[[R], RenderableType]


def print_result(result: R, as_json: bool, show: Show[R] | None = None) -> None:
    """JSON where asked for, otherwise what `show` makes of the result."""
    if as_json:
        print(result.model_dump_json(indent=2))
    elif show is not None:
        console().print(show(result))


def fail(message: str) -> int:
    """One paragraph on stderr; returns the exit code."""
    print(f"tq-mcp: {clean(message)}", file=sys.stderr)
    return FAILED


def console() -> Console:
    """stdout; wide where it is no terminal, so that nothing is cut in files and pipes."""
    width = None if sys.stdout.isatty() else max(PIPED_WIDTH, shutil.get_terminal_size().columns)
    return Console(width=width, highlight=False)


def size(count: int | None) -> str:
    """Bytes for people, in powers of 1000 as disks are sold."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return "–" if value is None else f"{value:,.{digits}f}{unit}"


def share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> Table:
    """A table whose first `left` columns are words, as is one named "text"; the others are numbers."""
    made = Table(title=Text(title), title_justify="left", header_style="bold")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index < left or name == "text" else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def pairs(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Names and values."""
    made = Table(title=Text(title), title_justify="left", show_header=False)
    for name, value in rows:
        made.add_row(Text(name), Text(value))
    return made


def conversion(made: schemas.Conversion) -> RenderableType:
    kept = "; ".join(f"{reason} ({count})" for reason, count in made.excluded.items())
    smaller = f"{made.compression:.2f} times smaller than {size(made.source_size_bytes)}"
    return pairs(
        f"Converted to {made.name}",
        [
            ("folder", made.path),
            ("made from", made.source),
            ("bits a weight", f"{made.bits_per_weight:.3f} in {made.modules} layers"),
            ("size", f"{size(made.size_bytes)}, {smaller}"),
            ("kept as they are", kept or "nothing"),
            ("took", f"{made.seconds:.1f} s, {size(made.peak_memory_bytes)} of memory at most"),
            ("next", f'tq-mcp generate --model {made.name} --prompt "Once upon a time"'),
        ],
    )


def export(made: schemas.Export) -> RenderableType:
    packed = f", {made.bits} bits in groups of {made.group_size}: {number(made.bits_per_weight)} bits a weight"
    return pairs(
        f"Exported {made.model}",
        [
            ("folder", made.path),
            ("form", made.form + (packed if made.bits else f" in {made.dtype}")),
            ("size", size(made.size_bytes)),
            ("took", f"{made.seconds:.1f} s"),
            ("next", f'mlx_lm.generate --model {made.path} --prompt "Once upon a time"'),
        ],
    )


def generation_line(made: schemas.Generation) -> str:
    """One line of figures."""
    return (
        f"{made.generation_tokens} tokens, {number(made.generation_tokens_per_s, 1)} a second; prompt of "
        f"{made.prompt_tokens}, {number(made.prompt_tokens_per_s, 1)} a second; cache {size(made.cache_bytes)} "
        f"({made.cache}); {made.kernel_path}; ended by {made.finish_reason}"
    )


def evaluation(made: schemas.Evaluation) -> RenderableType:
    rows = [
        (
            row.method,
            number(row.bits, 0),
            f"{row.bits_per_weight:.2f}",
            size(row.size_bytes),
            f"{row.ppl:,.2f}" + (f" ± {row.ppl_stderr:,.2f}" if row.ppl_stderr is not None else ""),
            number(row.kl, 4),
            share(row.top1),
        )
        for row in made.rows
    ]
    columns = ("method", "bits", "bits a weight", "size", "perplexity", "KL divergence", "same first choice")
    title = f"{made.model} on {made.text.name}: {made.num_samples} windows of {made.seq_len} tokens"
    paths = sorted({row.kernel_path for row in made.rows})
    notes = [*made.notes, "Perplexity: lower is better. Computed by " + "; ".join(paths) + "."]
    return Group(table(title, columns, rows), *(Text(note) for note in notes))


def cache_comparison(made: schemas.CacheComparison) -> RenderableType:
    rows = [
        (
            row.cache,
            size(row.cache_bytes),
            f"{row.compression:.2f} x",
            number(row.tokens_per_s, 1),
            number(row.kl, 4),
            share(row.top1),
            one_line(row.text, 60),
        )
        for row in made.rows
    ]
    columns = ("cache", "bytes", "compression", "tokens a second", "KL divergence", "same first choice", "text")
    title = f"{made.model}: a prompt of {made.prompt_tokens} tokens; compression against {made.baseline}"
    return table(title, columns, rows)


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min", "1.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def plan(made: schemas.Plan) -> RenderableType:
    rows = [
        (
            f"{row.bits} bits, groups of {row.group_size}",
            f"{row.bits_per_weight:.2f}",
            size(row.size_bytes),
            f"{row.compression:.2f} x",
            size(row.disk_bytes),
            size(row.memory_bytes),
            "yes" if row.fits else "no",
        )
        for row in made.rows
    ]
    columns = ("recipe", "bits a weight", "size", "compression", "disk to convert", "memory to run", "fits")
    parameters = f"{made.parameters / 1e6:,.1f} M parameters"
    title = f"{made.model} ({made.model_type}, {parameters}, {size(made.source_size_bytes)})"
    caches = [(f"{cache.k_bits} / {cache.v_bits}", size(cache.cache_bytes)) for cache in made.caches]
    download = f", and downloads {size(made.download_bytes)}" if made.download_bytes else ""
    return Group(
        table(title, columns, rows),
        table(f"Cache of {made.context:,} tokens", ("bits of keys / values", "size"), caches),
        Text(f"Converting takes about {duration(made.seconds_to_convert)} and "
             f"{size(made.memory_to_convert_bytes)} of memory{download}. "
             f"Recommended: {made.recommended_bits or 'none'} bits; {made.reason}."),
    )  # fmt: skip


def push(made: schemas.Push) -> RenderableType:
    what = f"{made.name}: {len(made.files) + 1} files, {size(made.size_bytes)}"
    done = f"Uploaded to {made.url}." if made.url else f"Nothing was uploaded. With --yes it goes to {made.repo}."
    return Group(Text(what), Text(made.card, style="dim"), Text(done))


def model_list(made: schemas.ModelList) -> RenderableType:
    rows = [
        (
            model.name,
            model.method,
            number(model.bits, 0),
            f"{model.bits_per_weight:.2f}",
            size(model.size_bytes),
            number(model.ppl),
            number(model.generation_tokens_per_s, 1),
            f"{model.created_at:%Y-%m-%d %H:%M}",
        )
        for model in made.models
    ]
    columns = ("name", "method", "bits", "bits a weight", "size", "perplexity", "tokens a second", "made (UTC)")
    shown = table(f"{len(made.models)} of {made.total} models", columns, rows, left=2)
    more = [Text(f"More: --cursor {made.next_cursor}")] if made.next_cursor else []
    return Group(shown, *(Text(notice) for notice in made.notices), *more)


def model_details(made: schemas.ModelDetails) -> RenderableType:
    recipe = ", ".join(f"{key} {value}" for key, value in made.recipe.items())
    about = pairs(
        made.name,
        [
            ("folder", made.path),
            ("made from", made.source + (f" at {made.source_revision}" if made.source_revision else "")),
            ("source's SHA-256", made.source_sha256),
            ("architecture", f"{made.architecture}, {made.parameters / 1e6:,.1f} M parameters"),
            ("recipe", recipe),
            ("bits a weight", f"{made.bits_per_weight:.3f}"),
            ("size", f"{size(made.size_bytes)}, was {size(made.source_size_bytes)}; {len(made.files)} files"),
            ("licence", made.licence or "not stated"),
            ("made", f"{made.created_at:%Y-%m-%d %H:%M} UTC on {made.hardware}, {number(made.seconds, 1)} s"),
            ("with", ", ".join(f"{name} {version}" for name, version in made.versions.items())),
            ("aliases, tags", ", ".join([*made.aliases, *made.tags]) or "none"),
        ],
    )
    measured = [
        (entry.dataset, entry.method, number(entry.bits, 0), f"{entry.windows} x {entry.seq_len}", number(entry.ppl),
         number(entry.kl, 4), share(entry.top1))
        for entry in made.evaluations
    ]  # fmt: skip
    speeds = [
        (entry.device, entry.cache, number(entry.prompt_tokens_per_s, 1), number(entry.generation_tokens_per_s, 1))
        for entry in made.speeds
    ]
    caches = [
        (entry.cache, size(entry.cache_bytes), f"{entry.compression:.2f} x", number(entry.kl, 4), share(entry.top1))
        for entry in made.cache_comparisons
    ]
    ppl_columns = ("text", "method", "bits", "windows", "perplexity", "KL divergence", "same first choice")
    speed_columns = ("device", "cache", "prompt tokens a second", "tokens a second")
    cache_columns = ("cache", "bytes", "compression", "KL divergence", "same first choice")
    return Group(
        about,
        table("Perplexity", ppl_columns, measured, left=2) if measured else Text("No perplexity was measured yet."),
        table("Speed", speed_columns, speeds, left=2) if speeds else Text("No speed was measured yet."),
        *([table("Caches", cache_columns, caches)] if caches else []),
    )


def verification(made: schemas.Verification) -> RenderableType:
    if made.intact:
        return Text(f"{made.name} is intact: {made.files_checked} files, {size(made.bytes_checked)}.")
    rows = [(problem.kind, problem.path, problem.detail) for problem in made.problems]
    return table(f"{made.name} is not what was registered", ("what", "file", "text"), rows, left=2)


def removal(made: schemas.Removal) -> RenderableType:
    what = f"{made.name}: {made.files} files, {size(made.size_bytes)}, in {made.path}"
    other = [Text(f"Not the model's own: {', '.join(made.foreign)}")] if made.foreign else []
    return Group(Text(what), *other, Text("Nothing was removed; with --yes it goes." if made.dry_run else "Removed."))


def diagnosis(made: schemas.Diagnosis) -> RenderableType:
    about = pairs(
        f"tq-mcp {made.version}",
        [
            ("platform", made.platform),
            ("processor", f"{made.processor}, {made.cpu_count} CPUs"),
            ("memory", f"{size(made.memory_available_bytes)} of {size(made.memory_total_bytes)} available"),
            ("Python", made.python),
            ("MLX", f"{made.mlx or 'missing'}, mlx-lm {made.mlx_lm or 'missing'}"),
            ("device, kernels", f"{made.device or 'none'}, {made.backend or 'none'}"),
            ("numba, BLAS", f"{made.numba or 'missing'}, {made.blas or 'unknown'}"),
            ("home", f"{made.home} ({size(made.disk_free_bytes)} free)"),
            ("registry", made.registry),
        ],
    )
    if not made.problems:
        return Group(about, Text("Nothing is missing."))
    return Group(about, *(Text(f"! {problem.what}\n  {problem.remedy}") for problem in made.problems))


def one_line(text: str, limit: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
