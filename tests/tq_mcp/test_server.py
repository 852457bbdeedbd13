"""The server as clients of both protocol eras meet it, in memory."""

import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client

import tq_mcp.services
import tq_mcp.worker
from quant_engine.config import CacheConfig
from quant_engine.errors import RecipeError
from tests.tq_mcp.conftest import NAME, error, structured
from tq_mcp import schemas
from tq_mcp.server import INSTRUCTIONS, build_server
from tq_mcp.settings import Settings

pytestmark = pytest.mark.anyio

TOOLS = {
    "plan_conversion": schemas.Plan,
    "convert_model": schemas.Conversion,
    "generate": schemas.Generation,
    "evaluate_ppl": schemas.Evaluation,
    "compare_kv_cache": schemas.CacheComparison,
    "list_models": schemas.ModelList,
    "get_model": schemas.ModelDetails,
    "verify_model": schemas.Verification,
}
PROMPT = "The history of the city begins in"


@pytest.fixture(params=["auto", "legacy"])
async def client(request: pytest.FixtureRequest, home: Path) -> AsyncIterator[Client]:
    async with Client(build_server(Settings(home)), mode=request.param) as connected:
        yield connected


class TestDescriptions:
    async def test_the_tools_come_in_the_order_of_use(self, client: Client) -> None:
        assert [tool.name for tool in (await client.list_tools()).tools] == list(TOOLS)

    async def test_each_has_a_title_all_annotations_and_a_description(self, client: Client) -> None:
        for tool in (await client.list_tools()).tools:
            assert tool.title and tool.description and tool.annotations
            hints = tool.annotations
            assert None not in (
                hints.read_only_hint, hints.destructive_hint, hints.idempotent_hint, hints.open_world_hint
            ), tool.name  # fmt: skip

    async def test_what_writes_says_so_and_nothing_destroys(self, client: Client) -> None:
        tools = {tool.name: tool.annotations for tool in (await client.list_tools()).tools}
        reading = {name for name, hints in tools.items() if hints and hints.read_only_hint}
        assert reading == {"plan_conversion", "list_models", "get_model", "verify_model"}
        assert not any(hints.destructive_hint for hints in tools.values() if hints)

    async def test_inputs_are_strict_and_outputs_are_the_schemas(self, client: Client) -> None:
        for tool in (await client.list_tools()).tools:
            assert tool.input_schema["additionalProperties"] is False, tool.name
            assert tool.output_schema is not None
            assert set(tool.output_schema["properties"]) == set(TOOLS[tool.name].model_fields)

    async def test_no_argument_names_an_output_or_asks_for_code(self, client: Client) -> None:
        names = {name for tool in (await client.list_tools()).tools for name in tool.input_schema["properties"]}
        assert not {name for name in names if "path" in name or "output" in name or "trust" in name or "code" in name}

    async def test_the_instructions_name_every_tool(self, client: Client) -> None:
        assert client.instructions == INSTRUCTIONS
        assert [name for name in TOOLS if name not in INSTRUCTIONS] == []

    @pytest.mark.parametrize("tool", ["generate", "compare_kv_cache"])
    async def test_each_of_a_caches_widths_says_what_it_is_where_only_the_other_is_given(
        self, client: Client, tool: str
    ) -> None:
        schema = next(t.input_schema for t in (await client.list_tools()).tools if t.name == tool)["properties"]
        assert f"{CacheConfig().k_bits} where v_bits is given" in schema["k_bits"]["description"]
        assert f"{CacheConfig().v_bits} where k_bits is given" in schema["v_bits"]["description"]

    async def test_generated_text_is_marked_untrusted(self, client: Client) -> None:
        tools = {tool.name: tool.description or "" for tool in (await client.list_tools()).tools}
        assert "untrusted" in tools["generate"] and "untrusted" in tools["compare_kv_cache"]


class TestTheWholeWay:
    async def test_each_tool_answers_what_its_schema_promises(
        self, home: Path, demo_model: Path, client: Client
    ) -> None:
        plan = await structured(client, "plan_conversion", model=str(demo_model), bits=[4])
        made = await structured(client, "convert_model", model=str(demo_model), bits=4, name="four")
        assert made["size_bytes"] == plan["rows"][0]["size_bytes"]
        assert Path(made["path"]) == home / "models" / "four"
        ppl = await structured(client, "evaluate_ppl", model="four", num_samples=2, seq_len=64)
        assert [row["method"] for row in ppl["rows"]] == ["float", "affine", "turboquant"]
        text = await structured(client, "generate", model="four", prompt=PROMPT, max_tokens=6, k_bits=8)
        assert text["generation_tokens"] == 6 and text["cache"] == "8-bit keys, 4-bit values"
        caches = await structured(client, "compare_kv_cache", model="four", prompt=PROMPT, max_tokens=4, tq_bits=[4])
        assert [row["k_bits"] for row in caches["rows"]] == [None, 4]
        listed = await structured(client, "list_models", filters=["bits=4"])
        assert [model["name"] for model in listed["models"]] == ["four"]
        assert listed["models"][0]["ppl"] == ppl["rows"][2]["ppl"]
        details = await structured(client, "get_model", name="four")
        assert len(details["evaluations"]) == 3 and len(details["speeds"]) == 1
        assert len(details["cache_comparisons"]) == 2

    async def test_layers_can_be_given_widths(self, client: Client, demo_model: Path) -> None:
        even = await structured(client, "plan_conversion", model=str(demo_model), bits=[3])
        widths = {"attn_bits": 4, "bits_for": {"*.down_proj": 2}, "embed_bits": 4}
        own = await structured(client, "plan_conversion", model=str(demo_model), bits=[3], widths=widths)
        made = await structured(client, "convert_model", model=str(demo_model), bits=3, widths=widths, name="own")
        assert made["size_bytes"] == own["rows"][0]["size_bytes"] < even["rows"][0]["size_bytes"]
        recipe = (await structured(client, "get_model", name="own"))["recipe"]
        assert (recipe["attn_bits"], recipe["bits_for"]) == (4, [["*.down_proj", 2]])
        text = await structured(client, "generate", model="own", prompt=PROMPT, max_tokens=4)
        assert text["generation_tokens"] == 4

    async def test_bits_can_be_shared_out_by_what_layers_bear(self, client: Client, demo_model: Path) -> None:
        own = {"model": str(demo_model), "target_bpw": 3, "target_text": str(demo_model / "README.md")}
        made = await structured(client, "convert_model", **own, name="shared")
        assert 2.9 < made["bits_per_weight"] <= 3

    async def test_progress_grows_to_the_end(self, client: Client, demo_model: Path) -> None:
        seen: list[tuple[float, float | None, str | None]] = []

        async def report(progress: float, total: float | None, message: str | None) -> None:
            seen.append((progress, total, message))

        await client.call_tool("convert_model", {"model": str(demo_model), "name": "p"}, progress_callback=report)
        values = [progress for progress, _, _ in seen]
        assert values == sorted(set(values))
        assert seen[-1][0] == seen[-1][1]


class TestErrors:
    async def test_an_unknown_argument_is_named_with_those_that_exist(self, client: Client) -> None:
        words = await error(client, "get_model", name=NAME, colour="red")
        assert "'colour'" in words and "the arguments are name" in words

    async def test_an_unknown_width_is_named(self, client: Client) -> None:
        words = await error(client, "plan_conversion", model="x", widths={"tail_bits": 3})
        assert "widths.tail_bits" in words

    async def test_a_missing_argument_is_named(self, client: Client) -> None:
        assert "the argument 'name' is missing" in await error(client, "get_model")

    async def test_a_value_that_is_not_allowed_is_named_with_those_that_are(self, client: Client) -> None:
        words = await error(client, "convert_model", model="x", bits=5)
        assert "bits is 5" in words and "2, 3 or 4" in words

    async def test_a_name_that_leaves_the_models_folder_is_refused(self, client: Client, demo_model: Path) -> None:
        assert "name is '../x'" in await error(client, "convert_model", model=str(demo_model), name="../x")

    async def test_an_unknown_model_is_answered_with_the_nearest_and_the_next_tool(self, client: Client) -> None:
        words = await error(client, "generate", model="smal", prompt="x")
        assert f"Nearest: {NAME}" in words and "list_models" in words

    async def test_a_wrong_filter_is_explained(self, client: Client) -> None:
        assert "shoe_size" in await error(client, "list_models", filters=["shoe_size=42"])

    async def test_a_taken_name_is_explained(self, client: Client, demo_model: Path) -> None:
        assert "taken" in await error(client, "convert_model", model=str(demo_model), name=NAME)

    async def test_no_network_is_explained(self, client: Client) -> None:
        assert "Hub" in await error(client, "plan_conversion", model="owner/name")

    async def test_a_full_disk_is_explained(
        self, client: Client, demo_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(tq_mcp.services, "convert", full)
        words = await error(client, "convert_model", model=str(demo_model), name="full")
        assert "No space left on device" in words

    @pytest.mark.parametrize(
        ("tool", "arguments"), [("plan_conversion", {"model": "x/y"}), ("get_model", {"name": NAME})]
    )
    async def test_a_failure_that_nobody_expected_is_told_and_its_traceback_logged(
        self,
        client: Client,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        tool: str,
        arguments: dict[str, Any],
    ) -> None:
        def crash(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("division by zero")

        for method in ("plan", "get_model"):
            monkeypatch.setattr(tq_mcp.services.Services, method, crash)
        words = await error(client, tool, **arguments)
        assert "It failed: ZeroDivisionError: division by zero. Next: " in words
        assert any(record.exc_info for record in caplog.records)

    async def test_a_folder_without_a_tokenizer_is_refused_by_name(
        self, client: Client, demo_model: Path, tmp_path: Path
    ) -> None:
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(demo_model / name, tmp_path / name)
        prompt = {"prompt": PROMPT}
        tools = {"plan_conversion": {}, "convert_model": {}, "evaluate_ppl": {}, "generate": prompt}
        for tool, arguments in (tools | {"compare_kv_cache": prompt}).items():
            words = await error(client, tool, model=str(tmp_path), **arguments)
            assert f"{tmp_path} has no tokenizer (none of tokenizer.json, " in words, tool

    async def test_what_a_file_smuggles_into_an_error_is_cleaned(
        self, client: Client, demo_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise RecipeError("tensor \x1b[2J\u202eevil " + "x" * 10_000)

        monkeypatch.setattr(tq_mcp.services, "convert", fail)
        words = await error(client, "convert_model", model=str(demo_model), name="evil")
        assert "\x1b" not in words and "\u202e" not in words and len(words) < 3_000


class TestLongWork:
    async def test_the_registry_answers_while_a_conversion_runs(
        self, client: Client, demo_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        release, answers = threading.Event(), []

        def slow(*_: Any, **__: Any) -> None:
            release.wait(30)
            raise RecipeError("released")

        monkeypatch.setattr(tq_mcp.services, "convert", slow)

        async def convert() -> None:
            answers.append(await error(client, "convert_model", model=str(demo_model), name="slow"))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(convert)
            listed = await structured(client, "list_models")
            shown = await structured(client, "get_model", name=NAME)
            assert answers == []
            release.set()
        assert listed["total"] == 1 and shown["name"] == NAME
        assert "Released" in answers[0]

    async def test_cancelling_a_conversion_leaves_nothing_behind(
        self, client: Client, demo_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tq_mcp.worker, "INTERVAL_S", 0.001)
        ended = threading.Event()
        convert = tq_mcp.services.convert

        def watched(*values: Any, progress: Any, **options: Any) -> Any:
            def paced(done: int, total: int, message: str) -> None:
                ended.wait(0.02)
                progress(done, total, message)

            try:
                return convert(*values, progress=paced, **options)
            finally:
                ended.set()

        monkeypatch.setattr(tq_mcp.services, "convert", watched)
        with anyio.CancelScope() as scope:

            async def cancel(progress: float, total: float | None, message: str | None) -> None:
                if progress > 0.1:
                    scope.cancel()

            arguments = {"model": str(demo_model), "name": "cancelled"}
            await client.call_tool("convert_model", arguments, progress_callback=cancel)
        assert scope.cancelled_caught
        await anyio.to_thread.run_sync(ended.wait)
        listed = await structured(client, "generate", model=NAME, prompt=PROMPT, max_tokens=1)
        assert listed["model"] == NAME  # the worker is free again
        assert [path.name for path in (home / "models").iterdir() if path.name != ".staging"] == [NAME]
        assert list((home / "models" / ".staging").iterdir()) == []
        assert (await structured(client, "list_models"))["total"] == 1
