import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import tq_mcp.services
from quant_engine.config import CacheConfig, QuantConfig
from quant_engine.convert import convert
from quant_engine.errors import (
    InputError,
    OutputError,
    RecipeError,
    SourceError,
    UnsafeModelError,
    UnsupportedModelError,
)
from quant_engine.file_hash import file_sha256
from quant_engine.source import Source
from registry import RegistryError, open_registry
from tests.tq_mcp.conftest import NAME
from tq_mcp import loaded_model
from tq_mcp.services import Services, cache_configs, open_services
from tq_mcp.settings import Settings

ROOT = Path(__file__).parents[2]
PROMPT = "The history of the city begins in"


def hashes(folder: Path) -> list[tuple[str, str]]:
    """Name and SHA-256 of each file."""
    return [(path.name, file_sha256(path)) for path in sorted(folder.iterdir())]


class Stop(Exception):
    """Raised by a progress callback."""


def left_behind(home: Path) -> list[Path]:
    """Whatever is under the models folder."""
    return [path for path in (home / "models").rglob("*") if path.name != ".staging"]


@pytest.fixture
def services(home: Path) -> Iterator[Services]:
    with open_services(Settings(home)) as opened:
        yield opened


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Services]:
    with open_services(Settings(tmp_path / "empty")) as opened:
        yield opened


@pytest.fixture
def own_source(demo_model: Path, tmp_path: Path) -> Path:
    """A copy of the demo model that a test may change."""
    return Path(shutil.copytree(demo_model, tmp_path / "source", ignore=shutil.ignore_patterns("*.py", "__pycache__")))


class TestConvert:
    def test_the_result_tells_what_is_on_the_disk(self, converted_home: Path, demo_model: Path) -> None:
        with open_services(Settings(converted_home)) as services:
            details = services.get_model(NAME)
        folder = converted_home / "models" / NAME
        assert Path(details.path) == folder
        assert {file.path: file.size_bytes for file in details.files} == {
            path.name: path.stat().st_size for path in folder.iterdir()
        }
        assert details.source == str(demo_model)
        assert details.bits_per_weight == pytest.approx(3.25, abs=0.01)
        assert details.recipe == QuantConfig().to_dict()

    def test_a_name_is_made_from_source_and_recipe(self, empty: Services, demo_model: Path) -> None:
        made = empty.convert(str(demo_model), recipe=QuantConfig(bits=2, group_size=32))
        assert made.name == "demo_model-tq2-g32"

    def test_a_folder_of_the_users_choice_is_registered_where_it_is(
        self, empty: Services, demo_model: Path, tmp_path: Path
    ) -> None:
        made = empty.convert(str(demo_model), recipe=QuantConfig(), output=tmp_path / "chosen")
        assert made.name == "chosen" and (tmp_path / "chosen" / "config.json").exists()
        assert empty.get_model("chosen").external
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_a_taken_name_is_refused_before_any_work(self, services: Services, demo_model: Path) -> None:
        ticks: list[str] = []
        with pytest.raises(RegistryError, match="taken"):
            services.convert(
                str(demo_model), recipe=QuantConfig(), name=NAME, progress=lambda *tick: ticks.append(tick[2])
            )
        assert ticks == []

    def test_a_name_that_would_leave_the_models_folder_is_refused(self, empty: Services, demo_model: Path) -> None:
        with pytest.raises(RegistryError, match="model name"):
            empty.convert(str(demo_model), recipe=QuantConfig(), name="../outside")

    def test_an_exception_from_progress_leaves_nothing(self, empty: Services, demo_model: Path, tmp_path: Path) -> None:
        def stop(done: int, total: int, message: str) -> None:
            if done > 0:
                raise Stop

        with pytest.raises(Stop):
            empty.convert(str(demo_model), recipe=QuantConfig(), progress=stop)
        assert left_behind(tmp_path / "empty") == []
        assert empty.list_models().total == 0

    def test_a_failure_leaves_nothing_and_the_name_free(
        self, empty: Services, own_source: Path, tmp_path: Path
    ) -> None:
        weights = own_source / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[:-1000])
        with pytest.raises(Exception, match="download"):
            empty.convert(str(own_source), recipe=QuantConfig(), name="again")
        assert left_behind(tmp_path / "empty") == []
        weights.write_bytes(whole)
        assert empty.convert(str(own_source), recipe=QuantConfig(), name="again").name == "again"

    def test_a_model_that_asks_for_code_is_refused(self, empty: Services, own_source: Path) -> None:
        config = json.loads((own_source / "config.json").read_text())
        (own_source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "code.py"}}))
        with pytest.raises(UnsafeModelError, match="auto_map"):
            empty.convert(str(own_source), recipe=QuantConfig())

    def test_a_model_converted_already_is_refused(self, services: Services) -> None:
        with pytest.raises(Exception, match="already"):
            services.convert(NAME, recipe=QuantConfig(), name="twice")

    def test_a_target_is_shared_out_by_a_text_of_the_users(
        self, empty: Services, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: dict[str, Any] = {}

        def allocate(source: Source, recipe: QuantConfig, target: float, **settings: Any) -> QuantConfig:
            given.update(settings, target=target)
            return recipe

        monkeypatch.setattr(tq_mcp.services, "allocate", allocate)
        (tmp_path / "own.txt").write_text("Some prose.")
        settings: dict[str, Any] = {"recipe": QuantConfig(), "target_bpw": 3.5, "keep_unfitting": True}
        empty.convert(str(demo_model), target_text=tmp_path / "own.txt", **settings)
        assert (given["target"], given["keep_unfitting"], given["text"].text) == (3.5, True, "Some prose.")
        empty.convert(str(demo_model), name="other", **settings)
        assert given["text"] is None

    @pytest.mark.parametrize(
        ("target", "text", "words"),
        [
            (None, "own.txt", r"target_text is 'own\.txt' and there is no target_bpw .* leave target_text out"),
            (3.0, "absent.txt", r"text 'absent\.txt' cannot be read"),
        ],
    )
    def test_a_text_that_cannot_be_used_is_refused(
        self, empty: Services, demo_model: Path, target: float | None, text: str, words: str
    ) -> None:
        with pytest.raises(InputError, match=words):
            empty.convert(str(demo_model), recipe=QuantConfig(), target_bpw=target, target_text=text)


SHARD = 400_000

DYING = """
import os, signal, sys
import mlx.core as mx
mx.set_default_device(mx.cpu)  # as in the tests
from tq_mcp import services
from tq_mcp.cli import main
convert = services.convert
def dying(*given, progress, **options):
    def die(done, total, message):
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)
    return convert(*given, progress=die, max_shard_bytes=int(sys.argv[1]), **options)
services.convert = dying
main(["convert", *sys.argv[2:]])
"""


class TestConvertKilled:
    @pytest.fixture
    def killed(
        self, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Callable[[Path | None], Path]:
        """Has `tq-mcp convert` killed half-way, into a folder of the user's choice or its own; its slot's folder."""
        monkeypatch.setattr(tq_mcp.services, "convert", partial(convert, max_shard_bytes=SHARD))

        def kill(output: Path | None) -> Path:
            options = ["--mlx-path", str(output)] if output else ["--name", "model"]
            options += ["--hf-path", str(demo_model), "--home", str(tmp_path / "empty")]
            died = subprocess.run([sys.executable, "-c", DYING, str(SHARD), *options], check=False, cwd=ROOT)
            assert died.returncode == -signal.SIGKILL
            slots = output.parent.glob(".tq-*") if output else (tmp_path / "empty" / "models" / ".staging").iterdir()
            return next(slots)

        return kill

    @pytest.mark.parametrize("outside", [False, True])
    def test_the_same_conversion_goes_on(
        self, killed: Callable[[Path | None], Path], demo_model: Path, tmp_path: Path, outside: bool
    ) -> None:
        output = tmp_path / "chosen" / "model" if outside else None
        left = killed(output)
        finished = {path.name: path.stat().st_ino for path in left.glob(".model.partial-*/*.safetensors")}
        told: list[str] = []
        with open_services(Settings(tmp_path / "empty")) as services:
            assert services.list_models().total == 0
            made = services.convert(
                str(demo_model), recipe=QuantConfig(), name="model", output=output,
                progress=lambda *tick: told.append(tick[2]),
            )  # fmt: skip
        assert any(message.startswith("continuing: ") for message in told)
        kept = [name for name, inode in finished.items() if (Path(made.path) / name).stat().st_ino == inode]
        assert len(kept) >= len(finished) - 1 > 0, "more than the one that was being written was written again"
        reference = convert(demo_model, tmp_path / "whole" / "model", config=QuantConfig(), max_shard_bytes=SHARD)
        assert [(f.name, f.sha256) for f in reference.files] == hashes(Path(made.path))
        with open_registry(tmp_path / "empty") as registry:
            assert registry.verify("model").ok
        assert not left.exists() and os.listdir(tmp_path / "empty" / "models" / ".staging") == []
        assert os.listdir(Path(made.path).parent) in (["model"], [".staging", "model"], ["model", ".staging"])

    def test_another_conversion_removes_what_was_left(
        self, killed: Callable[[Path | None], Path], demo_model: Path, tmp_path: Path
    ) -> None:
        left = killed(tmp_path / "chosen" / "model")
        with open_services(Settings(tmp_path / "empty")) as services:
            assert left.exists()
            services.convert(str(demo_model), recipe=QuantConfig(), name="other")
        assert not left.exists() and os.listdir(tmp_path / "empty" / "models" / ".staging") == []


class TestExport:
    def test_a_registered_model_is_written_and_not_registered_again(self, services: Services, tmp_path: Path) -> None:
        made = services.export(NAME, tmp_path / "out", form="mxfp4")
        assert (made.model, made.path, made.bits, made.group_size) == (NAME, str(tmp_path / "out"), 4, 32)
        assert set(made.files) == {path.name for path in (tmp_path / "out").iterdir()}
        assert services.list_models().total == 1

    def test_a_registered_model_is_never_overwritten(self, services: Services, demo_model: Path, home: Path) -> None:
        services.convert(str(demo_model), recipe=QuantConfig(bits=2), name="other")
        with pytest.raises(OutputError, match="the registered model other"):
            services.export(NAME, home / "models" / "other", overwrite=True)
        assert services.generate("other", PROMPT, max_tokens=1).text is not None

    def test_no_registered_model_is_overwritten_wherever_it_lies(
        self, services: Services, demo_model: Path, tmp_path: Path
    ) -> None:
        place = tmp_path / "around" / NAME
        services.convert(str(demo_model), recipe=QuantConfig(bits=2), name="other", output=place)
        shutil.copy(place / "config.json", place.parent)
        for output in (place, place.parent):
            with pytest.raises(OutputError, match="the registered model other"):
                services.export(NAME, output, overwrite=True)
        assert services.generate("other", PROMPT, max_tokens=1).text is not None

    def test_what_a_model_was_made_from_is_not_overwritten(
        self, services: Services, demo_model: Path, tmp_path: Path
    ) -> None:
        origin = Path(shutil.copytree(demo_model, tmp_path / "origin"))
        services.convert(str(origin), recipe=QuantConfig(bits=2), name="made")
        with pytest.raises(OutputError, match="from which made was made"):
            services.export("made", origin, overwrite=True)
        assert (origin / "model.safetensors").exists()

    def test_a_float_model_is_refused(self, services: Services, demo_model: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match="was not converted"):
            services.export(str(demo_model), tmp_path / "out")


class TestGenerate:
    def test_text_is_continued_and_the_speed_recorded(self, services: Services) -> None:
        ticks: list[tuple[int, int]] = []
        made = services.generate(NAME, PROMPT, max_tokens=8, progress=lambda *tick: ticks.append(tick[:2]))
        assert made.model == NAME and made.text and made.generation_tokens == 8
        assert made.cache == "full precision"
        (speed,) = services.get_model(NAME).speeds
        assert speed.generation_tokens == 8
        assert services.list_models().models[0].generation_tokens_per_s == speed.generation_tokens_per_s
        total = made.prompt_tokens - 1 + 8
        assert ticks[-9:] == [(done, total) for done in range(total - 8, total + 1)]

    def test_one_token_tells_no_speed_and_leaves_the_latest(self, services: Services) -> None:
        known = services.generate(NAME, PROMPT, max_tokens=8).generation_tokens_per_s
        assert services.generate(NAME, PROMPT, max_tokens=1).generation_tokens_per_s is None
        assert [speed.generation_tokens_per_s for speed in services.get_model(NAME).speeds] == [known, None]
        assert services.list_models().models[0].generation_tokens_per_s == known

    def test_the_text_arrives_in_pieces(self, services: Services) -> None:
        pieces: list[str] = []
        made = services.generate(NAME, PROMPT, max_tokens=8, on_text=pieces.append)
        assert "".join(pieces) == made.text and len(pieces) > 1

    def test_a_model_that_is_not_registered_works_too(self, services: Services, demo_model: Path) -> None:
        assert services.generate(str(demo_model), PROMPT, max_tokens=2).model == "demo_model"

    def test_the_same_model_is_loaded_once(self, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
        loads: list[Any] = []
        load = loaded_model.load
        monkeypatch.setattr(loaded_model, "load", lambda ref, **options: loads.append(ref) or load(ref, **options))
        for _ in range(2):
            services.generate(NAME, PROMPT, max_tokens=1)
        assert len(loads) == 1

    def test_a_folder_that_was_made_anew_is_loaded_anew(self, services: Services, own_source: Path) -> None:
        first = services.generate(str(own_source), PROMPT, max_tokens=3)
        config = own_source / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 3'))
        assert services._loaded is not None
        with pytest.raises(Exception, match="layers"):
            services.generate(str(own_source), PROMPT, max_tokens=3)
        assert first.text

    def test_an_empty_prompt_is_refused(self, services: Services) -> None:
        with pytest.raises(InputError, match="empty"):
            services.generate(NAME, "  ")

    def test_a_compressed_cache_is_named(self, services: Services) -> None:
        made = services.generate(NAME, PROMPT, max_tokens=4, cache=CacheConfig(8, 4))
        assert made.cache == "8-bit keys, 4-bit values"


class TestEvaluate:
    def test_a_registered_model_stands_beside_its_original(self, services: Services) -> None:
        report = services.evaluate(NAME, num_samples=2, seq_len=64)
        assert [row.method for row in report.rows] == ["float", "affine", "turboquant"]
        assert report.notes == [] and report.model == NAME
        entries = services.get_model(NAME).evaluations
        assert [(entry.method, entry.baseline) for entry in entries] == [
            ("float", True), ("affine", True), ("turboquant", False),
        ]  # fmt: skip
        assert services.list_models().models[0].ppl == report.rows[-1].ppl

    def test_without_its_original_it_is_measured_alone_and_says_why(self, empty: Services, own_source: Path) -> None:
        empty.convert(str(own_source), recipe=QuantConfig(), name="orphan")
        shutil.rmtree(own_source)
        report = empty.evaluate("orphan", num_samples=1, seq_len=32)
        assert [row.method for row in report.rows] == ["turboquant"]
        assert "cannot be read" in report.notes[0]

    def test_a_changed_original_is_not_taken_for_it(self, empty: Services, own_source: Path) -> None:
        empty.convert(str(own_source), recipe=QuantConfig(), name="child")
        config = json.loads((own_source / "config.json").read_text())
        (own_source / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
        report = empty.evaluate("child", num_samples=1, seq_len=32)
        assert [row.method for row in report.rows] == ["turboquant"]
        assert "has changed" in report.notes[0]

    def test_a_float_model_is_measured_at_each_width_and_nothing_recorded(
        self, services: Services, demo_model: Path
    ) -> None:
        report = services.evaluate(str(demo_model), bits=[4], num_samples=1, seq_len=32, qjl=False)
        assert [(row.method, row.bits) for row in report.rows] == [("float", None), ("affine", 4), ("turboquant", 4)]
        assert services.get_model(NAME).evaluations == []

    def test_a_text_that_is_missing_is_explained(self, services: Services) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            services.evaluate(NAME, text="/nowhere.txt")


class TestCompare:
    def test_caches_stand_beside_full_precision_and_are_recorded(self, services: Services) -> None:
        report = services.compare_kv_cache(NAME, PROMPT, max_tokens=4, caches=cache_configs([4]))
        assert [(row.k_bits, row.v_bits) for row in report.rows] == [(None, None), (4, 4)]
        entries = services.get_model(NAME).cache_comparisons
        assert len({entry.run for entry in entries}) == 1 and len(entries) == 2

    def test_one_token_tells_no_speed(self, services: Services) -> None:
        report = services.compare_kv_cache(NAME, PROMPT, max_tokens=1, caches=cache_configs([4]))
        assert [row.tokens_per_s for row in report.rows] == [None, None]
        assert [entry.tokens_per_s for entry in services.get_model(NAME).cache_comparisons] == [None, None]


class TestPlan:
    def test_it_foretells_the_conversion(self, empty: Services, demo_model: Path) -> None:
        plan = empty.plan(str(demo_model), bits=[3])
        made = empty.convert(str(demo_model), recipe=QuantConfig())
        assert plan.rows[0].bits_per_weight == made.bits_per_weight
        assert plan.rows[0].size_bytes == made.size_bytes
        assert plan.excluded == made.excluded

    def test_a_width_that_does_not_exist_is_explained(self, empty: Services, demo_model: Path) -> None:
        with pytest.raises(RecipeError, match="bits is 5"):
            empty.plan(str(demo_model), bits=[5])

    def test_a_model_that_is_nowhere_is_explained(self, empty: Services) -> None:
        with pytest.raises(SourceError, match="no model at"):
            empty.plan("/nowhere/model")
