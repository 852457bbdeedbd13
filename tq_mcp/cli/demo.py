"""`tq-mcp demo`."""

import argparse
import time
from pathlib import Path

import anyio
from rich.console import Console, Group, RenderableType
from rich.text import Text

from tq_mcp import schemas
from tq_mcp.cli import output
from tq_mcp.cli.output import fail, print_result
from tq_mcp.demo import PROMPT, DemoError, Story, run_demo


def run(arguments: argparse.Namespace) -> int:
    home = arguments.home
    started = time.perf_counter()
    with Console(stderr=True).status("starting the server") as status:
        shown = {"step": ""}

        def tell(what: str, part: float | None) -> None:
            step = what.partition(":")[0]
            if step != shown["step"]:
                status.console.print(f"[dim]{time.perf_counter() - started:5.1f} s[/]  {step}")
                shown["step"] = step
            status.update(Text(what if part is None else f"{what} ({100 * min(part, 1):.0f} %)"))

        try:
            story = anyio.run(run_demo, arguments.model, home, tell)
        except DemoError as error:
            return fail(str(error))
    print_result(story, arguments.json, lambda told: table(told, time.perf_counter() - started, home))
    return 0


def table(story: Story, seconds: float, home: Path | None) -> RenderableType:
    """The story in one table and a few sentences."""
    made, told = story.conversion, {row.method: row for row in story.evaluation.rows}
    names = {
        "float": "original",
        "affine": f"MLX affine, {made.bits} bits",
        "turboquant": f"TurboQuant, {made.bits} bits",
    }
    rows = [told[method] for method in names if method in told]
    cells = [
        ("size of the model", *(output.size(row.size_bytes) for row in rows)),
        ("bits for each weight", *(f"{row.bits_per_weight:.2f}" for row in rows)),
        ("perplexity: surprise at real text, lower is better", *(f"{row.ppl:.2f}" for row in rows)),
        ("picks the same next word as the original", *(output.share(row.top1) for row in rows)),
    ]
    title = f"What compressing {Path(made.source).name} cost"
    columns = ("", *(names[row.method] for row in rows))
    listed = ", ".join(model.name for model in story.models.models)
    generated = story.generation
    speed = output.number(generated.generation_tokens_per_s, 0)
    return Group(
        output.table(title, columns, cells),
        Text(f"It writes {speed} tokens a second ({generated.kernel_path}):"),
        Text(f"  {PROMPT} {output.one_line(generated.text, 200)}", style="italic"),
        *(Text(_cache_sentence(row)) for row in story.caches.rows[2:3]),
        Text(f"Registered: {listed}" + (f" in {home}." if home else " (in a temporary home, gone now).")),
        Text(f"Six tools, called as an agent would, in {seconds:.0f} seconds. To connect one: tq-mcp serve --help"),
    )


def _cache_sentence(row: schemas.CacheRow) -> str:
    return (
        f"Its memory of the text so far (key-value cache, {row.k_bits}-bit keys, {row.v_bits}-bit values) is "
        f"{row.compression:.1f} times smaller, and it picks the same next word {output.share(row.top1)} of the time."
    )
