"""The arguments of every command. Imports nothing heavy, so that --help answers at once.

Each command names the module of `tq_mcp.cli` that runs it; modules have `run(arguments) -> exit code`.
"""

import argparse
from pathlib import Path
from typing import Any, Protocol

WEIGHT_BITS = (2, 3, 4)
MODULE_BITS = (2, 3, 4, 16)
CACHE_BITS = (2, 3, 4, 8)
GROUP_SIZES = (0, 32, 64, 128)
ROTATIONS = ("auto", "hadamard", "blockwise_hadamard", "none")
DTYPES = ("float32", "float16", "bfloat16")
FORMS = ("float", "affine", "mxfp4")
AFFINE_BITS = (2, 3, 4, 6, 8)
AFFINE_GROUP_SIZES = (32, 64, 128)
MLX_LM_PROGRAMS = ("generate", "chat", "server")

MODEL_HELP = "registry name, folder, or Hugging Face repository (owner/name)"
SOURCE_HELP = "float model: folder, or Hugging Face repository (owner/name)"

DESCRIPTION = """\
Make language models small with TurboQuant, run them, measure the cost, find them again.
Models are named by registry name, folder, or Hugging Face repository."""


class Commands(Protocol):
    """What argparse gives for adding commands; its own class is private."""

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser: ...


def folder(text: str) -> Path:
    """The absolute path of a folder that an option names."""
    try:
        if text:
            return Path(text).expanduser().absolute()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no such user's home") from error
    raise argparse.ArgumentTypeError("it is empty; name a folder, or leave the option out")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tq-mcp",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="First steps: tq-mcp demo. Then: tq-mcp plan --help.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_serve(commands)
    _add_demo(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_generate(commands)
    _add_evaluate(commands)
    _add_compare(commands)
    _add_plan(commands)
    _add_push(commands)
    _add_models(commands)
    _add_mlx_lm(commands)
    _add_doctor(commands)
    return parser


def _command(commands: Commands, name: str, module: str, purpose: str, example: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=purpose[0].lower() + purpose[1:].rstrip("."),
        description=purpose,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(module=module)
    parser.add_argument(
        "--home", type=folder, metavar="DIR", help="models and registry (default: TQ_HOME, or ~/.tq-mcp)"
    )
    return parser


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else, on stdout")


def _add_serve(commands: Commands) -> None:
    _command(
        commands,
        "serve",
        "serve",
        "Serve the tools to an MCP client over stdio.",
        "claude mcp add turboquant -- tq-mcp serve",
    )


def _add_demo(commands: Commands) -> None:
    parser = _command(
        commands,
        "demo",
        "demo",
        "Start the server as an agent would and use its tools, on a small model that comes along.",
        "tq-mcp demo --model Qwen/Qwen2.5-0.5B",
    )
    parser.add_argument("--model", help=f"{SOURCE_HELP} (default: the model that comes along)")
    _add_json(parser)


def _add_convert(commands: Commands) -> None:
    parser = _command(
        commands,
        "convert",
        "convert",
        "Compress a model with TurboQuant and register it.",
        "tq-mcp convert --hf-path Qwen/Qwen2.5-0.5B --bits 3 --group-size 64",
    )
    _add_source(parser)
    parser.add_argument("--mlx-path", type=folder, metavar="DIR", help="folder to write (default: HOME/models/NAME)")
    parser.add_argument("--name", help="registry name (default: that of --mlx-path, or made from the source)")
    parser.add_argument("--bits", type=int, choices=WEIGHT_BITS, default=3, help="bits a weight (default: 3)")
    _add_group_size(parser)
    parser.add_argument(
        "--rotation", choices=ROTATIONS, default="auto", help="mixing before rounding (default: auto, what fits)"
    )
    _add_fold_rotation(parser)
    parser.add_argument("--use-qjl", action="store_true", help="one more bit a weight for unbiased products")
    parser.add_argument("--dtype", choices=DTYPES, help="of weights that are not quantized (default: as they are)")
    parser.add_argument(
        "--target-bpw", type=float, metavar="BITS",
        help="average bits a weight, scales included: layers get bits and groups by what they bear; runs the float "
        "model",
    )  # fmt: skip
    parser.add_argument(
        "--target-text", metavar="FILE",
        help="UTF-8 file, or wikitext2, to measure on for --target-bpw (default: text that the model writes)",
    )  # fmt: skip
    _add_module_widths(parser)
    _add_keep_unfitting(parser)
    parser.add_argument(
        "--keep-source", action="store_true",
        help="keep a repository's weights in Hugging Face's cache (default: drop each file after use, unless it was "
        "there before)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the random rotation (default: 0)")
    _add_json(parser)


def _add_export(commands: Commands) -> None:
    parser = _command(
        commands,
        "export",
        "export",
        "Write a converted model as a folder that plain mlx-lm opens.",
        "tq-mcp export --model qwen-3bit --output qwen-affine --form affine --bits 4",
    )
    parser.add_argument("--model", required=True, help="converted model: " + MODEL_HELP)
    parser.add_argument("--output", type=folder, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--form", choices=FORMS, default="float", help="dequantized, or in a quantization of MLX's (default: float)"
    )
    parser.add_argument("--bits", type=int, choices=AFFINE_BITS, help="of --form affine (default: 4)")
    parser.add_argument(
        "--group-size", type=int, choices=AFFINE_GROUP_SIZES, help="of --form affine (default: 64); mxfp4 has 32"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of what is not packed (default: bfloat16)")
    parser.add_argument("--overwrite", action="store_true", help="replace a model that is in --output")
    _add_json(parser)


def _add_generate(commands: Commands) -> None:
    parser = _command(
        commands,
        "generate",
        "generate",
        "Continue a prompt.",
        'tq-mcp generate --model qwen-3bit --prompt "The capital of Norway is" --max-tokens 40',
    )
    _add_model_and_prompt(parser, max_tokens=256)
    parser.add_argument(
        "--temp", "--temperature", dest="temperature", type=float, default=0.0, help="0: greedy (default)"
    )
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0, help="default: 0, all tokens")
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--repetition-penalty", type=float, help="above 1 repeats less")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    _add_cache_bits(parser, "compress {} of the cache (default: full precision, or {} where {} is given)")
    _add_json(parser)


def _add_evaluate(commands: Commands) -> None:
    parser = _command(
        commands,
        "evaluate",
        "evaluate",
        "Measure what compression costs: float, MLX's affine quantization, and TurboQuant, side by side.",
        "tq-mcp evaluate --hf-path Qwen/Qwen2.5-0.5B --bits 2 3 4 --num-samples 32 --seq-len 512",
    )
    parser.add_argument(
        "--hf-path", "--model", dest="model", required=True, metavar="MODEL",
        help=f"{MODEL_HELP}; a registered model is measured as it is, beside its original",
    )  # fmt: skip
    parser.add_argument("--revision", help="commit, tag or branch of a repository")
    _add_widths(parser)
    _add_group_size(parser)
    parser.add_argument("--num-samples", type=int, default=32, help="windows of text (default: 32)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a window (default: 512)")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 file, or wikitext2 (default: prose that Python carries)")
    parser.add_argument("--no-affine", action="store_true", help="leave MLX's affine quantization out")
    parser.add_argument("--no-qjl", action="store_true", help="leave TurboQuant with QJL out")
    _add_json(parser)


def _add_compare(commands: Commands) -> None:
    parser = _command(
        commands,
        "compare-kv",
        "compare_kv",
        "Continue a prompt with a full-precision key-value cache and with compressed ones, side by side.",
        'tq-mcp compare-kv --model qwen-3bit --prompt "Once upon a time" --tq-bits 4',
    )
    _add_model_and_prompt(parser, max_tokens=64)
    parser.add_argument(
        "--tq-bits", type=int, nargs="+", choices=CACHE_BITS, metavar="{2,3,4,8}",
        help="keys and values alike, one cache each (default: 8/8, 8/4, 4/4, 3/3)",
    )  # fmt: skip
    _add_cache_bits(parser, "{} of one more cache (default: {} where {} is given)")
    _add_group_size(parser)
    _add_json(parser)


def _add_plan(commands: Commands) -> None:
    parser = _command(
        commands,
        "plan",
        "plan",
        "Say what converting a model would take and give, without downloading its weights.",
        "tq-mcp plan --hf-path Qwen/Qwen2.5-0.5B --context 8192",
    )
    _add_source(parser)
    _add_widths(parser)
    _add_group_size(parser)
    parser.add_argument("--context", type=int, default=4096, help="tokens that the cache is to hold (default: 4096)")
    _add_fold_rotation(parser)
    parser.add_argument("--use-qjl", action="store_true", help="with QJL's additional bit")
    _add_module_widths(parser)
    _add_keep_unfitting(parser)
    _add_json(parser)


def _add_push(commands: Commands) -> None:
    parser = _command(
        commands,
        "push",
        "push",
        "Upload a registered model to the Hugging Face Hub, with a card that holds its measurements.",
        "tq-mcp push --model qwen-3bit --repo owner/qwen-3bit --yes",
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="registry name")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--yes", action="store_true", help="upload; without it, only show what would go")
    _add_json(parser)


def _add_models(commands: Commands) -> None:
    models = commands.add_parser("models", help="list, show, verify and remove registered models")
    actions = models.add_subparsers(dest="action", required=True)
    listing = _command(
        actions, "ls", "models", "List registered models.", 'tq-mcp models ls --filter "bits<=3" --sort ppl'
    )
    listing.add_argument(
        "--filter", action="append", default=[], dest="filters", metavar="CONDITION",
        help='such as "bits<=3", architecture=llama or name~qwen; may be repeated, then all must hold',
    )  # fmt: skip
    listing.add_argument("--sort", default="-created_at", help="a field, - before it for descending")
    listing.add_argument("--limit", type=int, default=50, help="default: 50")
    listing.add_argument("--cursor", help="next_cursor of the page before")
    _add_json(listing)
    _of_one_model(actions, "show", "Show all about one model.")
    _of_one_model(actions, "verify", "Hash a model's files again: are they still as they were made?")
    removing = _of_one_model(actions, "rm", "Delete a model's files and take it out of the registry.", " --yes")
    removing.add_argument("--yes", action="store_true", help="remove it; without it, only show what would go")
    removing.add_argument("--force", action="store_true", help="also files in its folder that are not the model's")


def _of_one_model(actions: Commands, name: str, purpose: str, option: str = "") -> argparse.ArgumentParser:
    parser = _command(actions, name, "models", purpose, f"tq-mcp models {name} qwen-3bit{option}")
    parser.add_argument("name", help="name or alias")
    _add_json(parser)
    return parser


def _add_mlx_lm(commands: Commands) -> None:
    parser = _command(
        commands,
        "mlx-lm",
        "mlx_lm",
        "Run mlx-lm's own generate, chat or server on a converted model.",
        "tq-mcp mlx-lm server --model qwen-3bit --port 8080",
    )
    parser.add_argument("program", choices=MLX_LM_PROGRAMS)
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="mlx-lm's, --help for one; --model takes a registry name too"
    )


def _add_doctor(commands: Commands) -> None:
    parser = _command(
        commands, "doctor", "doctor", "Show platform, backend, and what is missing with how to get it.", "tq-mcp doctor"
    )
    _add_json(parser)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hf-path", "--model", dest="model", required=True, metavar="MODEL", help=SOURCE_HELP)
    parser.add_argument("--revision", help="commit, tag or branch of a repository")


def _add_model_and_prompt(parser: argparse.ArgumentParser, *, max_tokens: int) -> None:
    parser.add_argument("--model", required=True, help=MODEL_HELP)
    parser.add_argument("--prompt", required=True, help="text to continue; - reads it from stdin")
    parser.add_argument("--max-tokens", type=int, default=max_tokens, help=f"default: {max_tokens}")
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: where the model has one)"
    )


def _add_widths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bits", type=int, nargs="+", choices=WEIGHT_BITS, default=list(WEIGHT_BITS), metavar="{2,3,4}",
        help="one or more widths (default: 2 3 4)",
    )  # fmt: skip


def _add_cache_bits(parser: argparse.ArgumentParser, purpose: str) -> None:
    """purpose: with places for what is compressed, its usual bits and the other option."""
    parser.add_argument("--k-bits", type=int, choices=CACHE_BITS, help=purpose.format("keys", 8, "--v-bits"))
    parser.add_argument("--v-bits", type=int, choices=CACHE_BITS, help=purpose.format("values", 4, "--k-bits"))


def _add_module_widths(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("widths of their own", "16 leaves modules as they came")
    for option, whose in {
        "--attn-bits": "attention layers",
        "--mlp-bits": "feed-forward layers",
        "--expert-bits": "a mixture's experts",
        "--expert-down-bits": "the experts' down projections",
        "--embed-bits": "token embeddings (default: as they came)",
        "--head-bits": "the output projection (default: as it came)",
    }.items():
        group.add_argument(option, type=int, choices=MODULE_BITS, help=f"of {whose}")
    group.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help='modules left as they came: "*.layers.0.*"'
    )
    group.add_argument(
        "--bits-for", action="append", default=[], type=_pattern_bits, metavar="PATTERN=BITS",
        help='bits of modules, the last that matches counts: "*.down_proj=4"',
    )  # fmt: skip
    group.add_argument("--protect-layers", type=int, default=0, metavar="N", help="leave N layers at each end")


def _pattern_bits(text: str) -> tuple[str, int]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or bits not in map(str, MODULE_BITS):
        raise argparse.ArgumentTypeError(f"{text!r}; give PATTERN=BITS, bits one of {', '.join(map(str, MODULE_BITS))}")
    return pattern, int(bits)


def module_widths(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `_add_module_widths` added, as settings of a recipe."""
    names = ("attn_bits", "mlp_bits", "expert_bits", "expert_down_bits", "embed_bits", "head_bits")
    return {name: getattr(arguments, name) for name in (*names, "skip", "bits_for", "protect_layers")}


def _add_group_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-size", type=int, choices=GROUP_SIZES, default=64, help="values that share a scale (default: 64)"
    )


def _add_fold_rotation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fold-rotation", action="store_true",
        help="fold norms and rotations into the weights: fewer rotations at run time (llama, mistral, qwen2, qwen3)",
    )  # fmt: skip


def _add_keep_unfitting(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep-unfitting", action="store_true", help="keep layers whose width no group divides, instead of failing"
    )
