"""The command line, called as a function."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import tq_mcp.cli.run
from quant_engine import config
from quant_engine.blueprint import DTYPES
from quant_engine.export import AFFINE_BITS, AFFINE_GROUP_SIZES, FORMS
from tests.tq_mcp.conftest import NAME
from tq_mcp import schemas
from tq_mcp.cli import main, parser

PROMPT = "The history of the city begins in"
COMMANDS = [
    "serve",
    "demo",
    "convert",
    "export",
    "generate",
    "evaluate",
    "compare-kv",
    "plan",
    "models ls",
    "models show",
    "models verify",
    "models rm",
    "mlx-lm",
    "doctor",
]


@pytest.fixture(autouse=True)
def _home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's home holds one model."""
    monkeypatch.setenv("TQ_HOME", str(home))


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The JSON of a command that has to work; nothing else may be on stdout."""
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_explains_itself_with_an_example_that_it_takes(
        self, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit:
            main([*command.split(), "--help"])
        shown = capsys.readouterr().out
        assert exit.value.code == 0 and "--home" in shown
        (example,) = re.findall(r"example: (?:.*-- )?tq-mcp (.*)", shown)
        assert example.startswith(command)
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', example)]
        parser.build_parser().parse_args(words)

    @pytest.mark.parametrize("command", ["generate", "compare-kv"])
    def test_each_of_a_caches_widths_says_what_it_is_where_only_the_other_is_given(
        self, command: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = " ".join(capsys.readouterr().out.split())
        assert "8 where --v-bits is given" in shown and "4 where --k-bits is given" in shown

    def test_help_imports_nothing_heavy(self) -> None:
        code = (
            "import sys\nfrom tq_mcp.cli import main\n"
            "try: main(['convert', '--help'])\nexcept SystemExit: pass\n"
            "heavy = {'mlx', 'mcp', 'pydantic', 'sqlalchemy', 'rich', 'numpy'}\n"
            "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ended.stderr.strip() == "[]"

    def test_the_choices_are_those_of_the_engine(self) -> None:
        assert parser.WEIGHT_BITS == config.WEIGHT_BITS
        assert parser.CACHE_BITS == config.CACHE_BITS
        assert parser.GROUP_SIZES == config.GROUP_SIZES
        assert parser.ROTATIONS == config.ROTATIONS
        assert tuple(DTYPES) == parser.DTYPES
        assert (parser.FORMS, parser.AFFINE_BITS, parser.AFFINE_GROUP_SIZES) == (FORMS, AFFINE_BITS, AFFINE_GROUP_SIZES)

    @pytest.mark.parametrize(
        "line",
        [
            "convert --hf-path a/b --mlx-path out --bits 2 --group-size 128 --rotation blockwise_hadamard --use-qjl "
            "--dtype float16",
            "generate --model m --prompt p --max-tokens 5",
            "evaluate --hf-path a/b --bits 2 3 4 --num-samples 8 --seq-len 256 --no-affine --no-qjl --text file.txt",
            "compare-kv --model m --prompt p --max-tokens 5 --tq-bits 3",
        ],
        ids=lambda line: line.split()[0],
    )
    def test_names_that_users_of_turboquant_mlx_know_are_taken(self, line: str) -> None:
        parser.build_parser().parse_args(line.split())

    @pytest.mark.parametrize("line", ["", "dance", "convert", "convert --hf-path a/b --bits 5", "models"])
    def test_wrong_usage_ends_with_2(self, line: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit:
            main(line.split())
        assert exit.value.code == 2 and "usage" in capsys.readouterr().err


class TestResults:
    def test_convert_writes_where_it_is_told_and_registers(
        self, capsys: pytest.CaptureFixture[str], demo_model: Path, tmp_path: Path
    ) -> None:
        place = tmp_path / "out"
        made = printed(capsys, "convert", "--hf-path", str(demo_model), "--mlx-path", str(place), "--bits", "2")
        assert set(made) == set(schemas.Conversion.model_fields)
        assert Path(made["path"]) == place and (place / "config.json").exists()
        assert printed(capsys, "models", "show", "out")["bits"] == 2

    def test_convert_folds_the_rotation_on_request(self, capsys: pytest.CaptureFixture[str], demo_model: Path) -> None:
        made = printed(capsys, "convert", "--model", str(demo_model), "--name", "folded", "--fold-rotation")
        assert made["fold_rotation"] is True
        assert printed(capsys, "models", "show", "folded")["recipe"]["fold_rotation"] is True

    def test_convert_shares_bits_out(self, capsys: pytest.CaptureFixture[str], demo_model: Path) -> None:
        text = ("--target-text", str(demo_model / "README.md"))
        made = printed(capsys, "convert", "--model", str(demo_model), "--name", "shared", "--target-bpw", "2.8", *text)
        assert 2.7 < made["bits_per_weight"] <= 2.8
        assert main(["convert", "--model", str(demo_model), "--name", "no", *text]) != 0
        assert "there is no target_bpw" in capsys.readouterr().err

    def test_convert_in_words(self, capsys: pytest.CaptureFixture[str], demo_model: Path) -> None:
        assert main(["convert", "--model", str(demo_model), "--name", "words"]) == 0
        shown = capsys.readouterr().out
        assert "Converted to words" in shown and "times smaller" in shown

    def test_export_as_json_and_in_words(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        command = ["export", "--model", NAME, "--output", str(tmp_path / "out"), "--form", "affine", "--bits", "8"]
        made = printed(capsys, *command)
        assert set(made) == set(schemas.Export.model_fields)
        assert (made["model"], made["form"], made["bits"], made["group_size"]) == (NAME, "affine", 8, 64)
        assert main([*command, "--overwrite"]) == 0
        assert "affine, 8 bits in groups of 64: 8.50 bits a weight" in capsys.readouterr().out
        assert main(["export", "--model", NAME, "--output", str(tmp_path / "float")]) == 0
        assert "float in bfloat16" in capsys.readouterr().out

    def test_generate_as_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        made = printed(capsys, "generate", "--model", NAME, "--prompt", PROMPT, "--max-tokens", "4", "--k-bits", "8")
        assert set(made) == set(schemas.Generation.model_fields)
        assert made["generation_tokens"] == 4

    def test_generate_writes_the_text_on_stdout_and_figures_on_stderr(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = printed(capsys, "generate", "--model", NAME, "--prompt", PROMPT, "--max-tokens", "4")["text"]
        assert main(["generate", "--model", NAME, "--prompt", PROMPT, "--max-tokens", "4"]) == 0
        shown = capsys.readouterr()
        assert shown.out.strip() == text.strip()
        assert "4 tokens" in shown.err

    def test_a_prompt_can_come_from_stdin(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
        piped = printed(capsys, "generate", "--model", NAME, "--prompt", "-", "--max-tokens", "4")
        told = printed(capsys, "generate", "--model", NAME, "--prompt", PROMPT, "--max-tokens", "4")
        assert piped["text"] == told["text"]

    def test_evaluate_prints_exactly_the_promised_json(
        self, capsys: pytest.CaptureFixture[str], demo_model: Path, tmp_path: Path
    ) -> None:
        text = tmp_path / "text.txt"
        text.write_text("The river runs through the old town. " * 200)
        made = printed(
            capsys, "evaluate", "--hf-path", str(demo_model), "--bits", "3", "--num-samples", "1", "--seq-len", "64",
            "--no-qjl", "--text", str(text),
        )  # fmt: skip
        assert list(made)[:6] == ["model", "text", "seq_len", "num_samples", "tokens", "rows"]
        assert made["text"]["name"] == "text.txt" and made["tokens"] == 63
        assert [row["method"] for row in made["rows"]] == ["float", "affine", "turboquant"]

    def test_evaluate_leaves_out_what_it_is_told_to(self, capsys: pytest.CaptureFixture[str], demo_model: Path) -> None:
        made = printed(
            capsys, "evaluate", "--hf-path", str(demo_model), "--bits", "2", "--num-samples", "1", "--seq-len", "32",
            "--no-affine",
        )  # fmt: skip
        assert [row["method"] for row in made["rows"]] == ["float", "turboquant", "turboquant+qjl"]

    def test_evaluate_in_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["evaluate", "--model", NAME, "--num-samples", "1", "--seq-len", "32"]) == 0
        shown = capsys.readouterr().out
        assert "perplexity" in shown and "turboquant" in shown and "lower is better" in shown

    def test_compare_kv_as_json_and_in_words(self, capsys: pytest.CaptureFixture[str]) -> None:
        command = ["compare-kv", "--model", NAME, "--prompt", PROMPT, "--max-tokens", "3", "--tq-bits", "4"]
        made = printed(capsys, *command)
        assert set(made["rows"][0]) >= {
            "cache", "k_bits", "v_bits", "cache_bytes", "compression", "tokens_per_s", "kl", "top1", "text",
        }  # fmt: skip
        assert main(command) == 0
        assert "compression" in capsys.readouterr().out

    def test_plan_as_json_and_in_words(self, capsys: pytest.CaptureFixture[str], demo_model: Path) -> None:
        made = printed(capsys, "plan", "--hf-path", str(demo_model), "--bits", "2", "4", "--context", "512")
        assert [row["bits"] for row in made["rows"]] == [2, 4] and made["context"] == 512
        assert main(["plan", "--hf-path", str(demo_model)]) == 0
        assert "Recommended" in capsys.readouterr().out

    def test_models_ls_filters_sorts_and_pages(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert printed(capsys, "models", "ls", "--filter", "bits<=3", "--sort", "ppl")["total"] == 1
        assert printed(capsys, "models", "ls", "--filter", "bits>3")["models"] == []
        assert main(["models", "ls"]) == 0
        assert NAME in capsys.readouterr().out

    def test_models_show_tells_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "--model", NAME, "--prompt", PROMPT, "--max-tokens", "3"]) == 0
        assert main(["evaluate", "--model", NAME, "--num-samples", "1", "--seq-len", "32"]) == 0
        capsys.readouterr()
        assert main(["models", "show", NAME]) == 0
        shown = capsys.readouterr().out
        assert "SHA-256" in shown and "Perplexity" in shown and "Speed" in shown

    def test_another_home_is_another_registry(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert printed(capsys, "models", "ls", "--home", str(tmp_path / "other"))["total"] == 0


class TestFailures:
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("models ls --home ~nobody-here/x", "'~nobody-here/x': there is no such user's home"),
            ("export --model x --output ~nobody-here/x", "there is no such user's home"),
            ("convert --hf-path x --mlx-path=", "--mlx-path: it is empty; name a folder"),
        ],
    )
    def test_folders_that_cannot_be_are_usage_errors(
        self, line: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit:
            main(line.split())
        assert exit.value.code == 2 and words in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("shell", "code", "words"),
        [
            ("printf '\\377\\376' | {} generate --model small --prompt -", 1, "prompt on stdin is not UTF-8"),
            ("{} generate --model small --prompt - <&-", 1, "Stdin is closed"),
            ("{} models show $'\\377'", 2, "is not UTF-8"),
            ("{} models ls >&-", 0, ""),
            ("{} models ls > /dev/full", 1, "could not be written"),
            ("PYTHONIOENCODING=ascii {} models ls", 0, ""),
        ],
    )
    def test_no_stream_makes_a_traceback(self, shell: str, code: int, words: str) -> None:
        command = ["bash", "-c", shell.format(f"{sys.executable} -m tq_mcp")]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == code and words in ended.stderr and "Traceback" not in ended.stderr

    @pytest.mark.parametrize("command", ["models ls", "doctor"])
    def test_a_home_that_cannot_be_is_named(
        self, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TQ_HOME", "~nobody-here/x")
        assert main(command.split()) == 1
        assert capsys.readouterr().err == "TQ_HOME is '~nobody-here/x', and there is no such user's home.\n"

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("generate --model smal --prompt x", f"Nearest: {NAME}"),
            ("models show nothing", "no model 'nothing'"),
            ("models ls --filter nonsense", "is not a filter"),
            ("convert --hf-path /nowhere/model", "no model at"),
            ("plan --hf-path owner/name", "Hub"),
            (f"generate --model {NAME} --prompt x --temp -1", "temperature"),
            (f"export --model {NAME} --output /tmp/never --bits 4", "bits 4 for form 'float'"),
        ],
        ids=lambda value: value[:24],
    )
    def test_a_failure_is_one_paragraph_on_stderr_and_exit_code_1(
        self, line: str, words: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(line.split()) == 1
        shown = capsys.readouterr()
        assert shown.out == "" and words.lower() in shown.err.lower()
        assert shown.err.startswith("tq-mcp: ") and shown.err.count("\n") == 1

    def test_an_output_that_exists_is_not_overwritten(
        self, capsys: pytest.CaptureFixture[str], demo_model: Path, tmp_path: Path
    ) -> None:
        place = tmp_path / "taken"
        place.mkdir()
        (place / "precious.txt").write_text("mine")
        assert main(["convert", "--hf-path", str(demo_model), "--mlx-path", str(place)]) == 1
        assert "exists already" in capsys.readouterr().err
        assert [path.name for path in place.iterdir()] == ["precious.txt"]

    def test_a_home_that_cannot_be_used_is_explained(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert main(["models", "ls", "--home", str(tmp_path / "file")]) == 1
        assert "cannot be used" in capsys.readouterr().err

    def test_a_full_disk_is_explained(
        self, capsys: pytest.CaptureFixture[str], demo_model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("tq_mcp.services.convert", full)
        assert main(["convert", "--hf-path", str(demo_model), "--name", "full"]) == 1
        assert "No space left" in capsys.readouterr().err

    def test_an_interruption_ends_with_130_and_leaves_nothing(
        self, capsys: pytest.CaptureFixture[str], demo_model: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        @contextmanager
        def interrupting() -> Iterator[Any]:
            def report(done: int, total: int, message: str) -> None:
                if done > total // 2:
                    raise KeyboardInterrupt

            yield report

        monkeypatch.setattr(tq_mcp.cli.run, "progress_bar", interrupting)
        assert main(["convert", "--hf-path", str(demo_model), "--name", "half"]) == 130
        assert "Interrupted" in capsys.readouterr().err
        assert [path.name for path in (home / "models").iterdir() if path.name != ".staging"] == [NAME]
        assert list((home / "models" / ".staging").iterdir()) == []

    def test_a_reader_that_goes_away_is_no_traceback(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with open(tmp_path / "stdout", "w") as behind:

            class Gone(io.StringIO):
                def write(self, text: str) -> int:
                    raise BrokenPipeError

                def fileno(self) -> int:
                    return behind.fileno()

            monkeypatch.setattr(sys, "stdout", Gone())
            assert main(["models", "ls", "--json"]) == 1


def test_a_terminal_sees_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with tq_mcp.cli.run.progress_bar() as report:
        report(1, 2, "layer 1")
    assert "layer 1" in capsys.readouterr().err


def test_the_module_is_the_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "tq_mcp", "--help"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "usage: tq-mcp" in ended.stdout
