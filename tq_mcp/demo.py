"""The demonstration: the server as an agent meets it, over stdio, each tool in order."""

import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mcp import Client
from mcp.client.stdio import StdioServerParameters
from mcp.types import TextContent

from tq_mcp import demo_model, schemas
from tq_mcp.settings import HOME_VARIABLE, child_environment

BITS = 3
PROMPT = "In 1998 the band released its first album,"
REPETITION_PENALTY = 1.2
WINDOWS, WINDOW_TOKENS = 16, 256
NEW_TOKENS = 40

R = TypeVar("R", bound=schemas.Result)
Tell = Callable[[str, float | None], None]
"""Told what goes on, and which part of it is done (None: unknown)."""


class DemoError(Exception):
    """A tool answered with an error; the text is its."""


class Story(schemas.Result):
    """What the tools answered, in order."""

    plan: schemas.Plan
    conversion: schemas.Conversion
    evaluation: schemas.Evaluation
    generation: schemas.Generation
    caches: schemas.CacheComparison
    models: schemas.ModelList


@dataclass(frozen=True)
class Demo:
    """A connection to a server, and somebody to tell about it."""

    client: Client
    tell: Tell

    async def call(self, kind: type[R], tool: str, **arguments: Any) -> R:
        """Call a tool and read its structured result. Raises DemoError with the tool's own words."""
        self.tell(tool, None)

        async def report(progress: float, total: float | None, message: str | None) -> None:
            self.tell(f"{tool}: {message}", progress / total if total else None)

        answer = await self.client.call_tool(tool, arguments, progress_callback=report)
        if answer.is_error or answer.structured_content is None:
            words = " ".join(part.text for part in answer.content if isinstance(part, TextContent))
            raise DemoError(f"{tool} failed. {words}")
        return kind.model_validate(answer.structured_content)

    async def play(self, model: str) -> Story:
        """All tools, as the server's instructions order them."""
        plan = await self.call(schemas.Plan, "plan_conversion", model=model)
        made = await self.call(schemas.Conversion, "convert_model", model=model, bits=BITS, keep_source=True)
        windows = {"seq_len": WINDOW_TOKENS, "num_samples": WINDOWS}
        evaluation = await self.call(schemas.Evaluation, "evaluate_ppl", model=made.name, **windows)
        prompt = {"model": made.name, "prompt": PROMPT, "max_tokens": NEW_TOKENS}
        generation = await self.call(schemas.Generation, "generate", repetition_penalty=REPETITION_PENALTY, **prompt)
        caches = await self.call(schemas.CacheComparison, "compare_kv_cache", **prompt)
        models = await self.call(schemas.ModelList, "list_models")
        return Story(
            plan=plan, conversion=made, evaluation=evaluation, generation=generation, caches=caches, models=models
        )


async def run_demo(model: str | None, home: Path | None, tell: Tell) -> Story:
    """Start `tq-mcp serve` and use it. model None: the one that comes along, without network. home None: a
    temporary one. Raises DemoError."""
    with _home(home) as place:
        changes = {HOME_VARIABLE: str(place), **({} if model else {"HF_HUB_OFFLINE": "1"})}
        server = StdioServerParameters(
            command=sys.executable, args=["-m", "tq_mcp", "serve"], env=child_environment(**changes)
        )
        tell("starting the server", None)
        async with Client(server) as client:
            try:
                return await Demo(client, tell).play(model or str(demo_model.path()))
            except DemoError as error:
                failed = error  # raised here, the client's task group would wrap it
    raise failed


@contextmanager
def _home(chosen: Path | None) -> Generator[Path]:
    if chosen is not None:
        yield chosen
        return
    with tempfile.TemporaryDirectory(prefix="tq-mcp-demo-") as folder:
        yield Path(folder)
