"""The `quantization` block of a converted model's config.json: all that loading needs to know."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self, cast

from quant_engine.codebook import lloyd_max
from quant_engine.config import QuantConfig
from quant_engine.errors import CorruptCheckpointError, RecipeError, UnsupportedModelError

METHOD = "turboquant"
FORMAT_VERSION = 3
_SINCE: Mapping[int, dict[str, Any]] = {2: {"fold_rotation": False, "stream_block": 1}, 3: {"groups_for": []}}
"""What blocks state since a version, and what those before it mean."""


@dataclass(frozen=True)
class ModuleEntry:
    """One quantized layer: bits of its codes, their groups, Hadamard block (1: none), shape, QJL or not.

    shape is (out, in), or (experts, out, in). Its tensors are `weight` uint32 (..., out, in * bits / 32), `scales`
    float16 (..., out, groups), with QJL `qjl_signs` uint32 (out, in / 32) and `qjl_norms` float16 (out,), and `bias`
    as it came, if the layer has one.
    """

    bits: int
    group_size: int
    block: int
    shape: tuple[int, ...]
    qjl: bool = False

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The safetensors dtype and the shape of each of its tensors but the bias, by the name's last part."""
        *out, width = self.shape
        groups = width // self.group_size if self.group_size else 1
        words = width * self.bits // 32
        packed = {"weight": ("U32", (*out, words)), "scales": ("F16", (*out, groups))}
        errors = {"qjl_signs": ("U32", (*out, width // 32)), "qjl_norms": ("F16", (*out,))}
        return cast(dict[str, tuple[str, tuple[int, ...]]], packed | errors if self.qjl else packed)


@dataclass(frozen=True)
class Manifest:
    """What a converted model is made of: recipe, quantized modules, what was kept and why, the origin.

    stream_block: Hadamard block by which looked-up embeddings are rotated, and the residual stream turned back before
    the last norm, in a model whose rotation is folded and whose embeddings are tied; 1: neither.
    """

    config: QuantConfig
    codebooks: Mapping[int, tuple[float, ...]]
    modules: Mapping[str, ModuleEntry]
    excluded: Mapping[str, str]
    source: Mapping[str, str | None]
    tool: Mapping[str, str]
    stream_block: int = 1

    @classmethod
    def of(
        cls,
        config: QuantConfig,
        modules: Mapping[str, ModuleEntry],
        excluded: Mapping[str, str],
        source: Mapping[str, str | None],
        stream_block: int = 1,
    ) -> Self:
        """The manifest of a new conversion, with the codebooks its modules use and the tool's versions."""
        codebooks = {bits: lloyd_max(bits) for bits in sorted({entry.bits for entry in modules.values()})}
        return cls(config, codebooks, modules, excluded, source, tool_versions(), stream_block)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self | None:
        """The manifest in a model's config.json, or None where it is not a TurboQuant model.

        Raises UnsupportedModelError for a newer format, CorruptCheckpointError for a block that is not whole.
        """
        block: Any = config.get("quantization")
        if not isinstance(block, dict) or cast(dict[str, Any], block).get("quant_method") != METHOD:
            return None
        return cls._from_block(dict(cast(dict[str, Any], block)))

    @classmethod
    def _from_block(cls, block: dict[str, Any]) -> Self:
        del block["quant_method"]
        found = _checked_version(block.pop("format_version", None))
        for since, values in _SINCE.items():
            if found < since:
                block |= values
        settings = [field.name for field in fields(QuantConfig)]
        expected = {*settings, "codebooks", "modules", "excluded", "source", "tool", "stream_block"}
        _check_keys("the quantization block", block, expected)
        try:
            recipe = QuantConfig.from_dict({name: block[name] for name in settings})
            codebooks = {int(bits): tuple(map(float, values)) for bits, values in block["codebooks"].items()}
            modules = {path: _entry(path, values) for path, values in block["modules"].items()}
            kept, source, tool = dict(block["excluded"]), dict(block["source"]), dict(block["tool"])
            stream_block = _positive("stream_block", block["stream_block"])
        except (RecipeError, AttributeError, TypeError, ValueError) as error:
            raise CorruptCheckpointError(
                f"config.json's quantization block cannot be read: {error}; convert the model again"
            ) from error
        for path, entry in modules.items():
            if len(codebooks.get(entry.bits, ())) != 2**entry.bits:
                raise CorruptCheckpointError(
                    f"config.json has no codebook of {2**entry.bits} values for the "
                    f"{entry.bits}-bit module {path}; convert the model again"
                )
        return cls(recipe, codebooks, modules, kept, source, tool, stream_block)

    def to_dict(self) -> dict[str, Any]:
        """The block as JSON values."""
        return {
            "quant_method": METHOD,
            "format_version": FORMAT_VERSION,
            **self.config.to_dict(),
            "codebooks": {str(bits): list(values) for bits, values in self.codebooks.items()},
            "modules": {path: asdict(entry) | {"shape": list(entry.shape)} for path, entry in self.modules.items()},
            "excluded": dict(self.excluded),
            "source": dict(self.source),
            "tool": dict(self.tool),
            "stream_block": self.stream_block,
        }

    @property
    def seed(self) -> int:
        """Seed of all signs."""
        return self.config.seed

    def codebook(self, bits: int) -> tuple[float, ...]:
        """The values of this model's codes of `bits` bits."""
        return self.codebooks[bits]

    def check_tensors(self, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Raise CorruptCheckpointError unless the files hold every packed tensor in the form stated here.

        tensors: safetensors dtype and shape by name.
        """
        for path, entry in self.modules.items():
            for part, stated in entry.tensors().items():
                found = tensors.get(f"{path}.{part}")
                if found != stated:
                    what = "missing" if found is None else f"{found[0]} {list(found[1])}"
                    raise CorruptCheckpointError(
                        f"tensor {path}.{part} is {what}; config.json says {stated[0]} "
                        f"{list(stated[1])}; convert the model again"
                    )


def tool_versions() -> dict[str, str]:
    """Versions of this package and of MLX."""
    return {name: _version(name) for name in ("tq-mcp", "mlx")}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}")
    return value


def _checked_version(found: Any) -> int:
    if type(found) is not int or found < 1:
        raise CorruptCheckpointError(
            f"config.json's quantization block has format_version {found!r}; it must be a "
            "positive whole number; convert the model again"
        )
    if found > FORMAT_VERSION:
        raise UnsupportedModelError(
            f"this model has format_version {found} and this tq-mcp reads up to {FORMAT_VERSION}; "
            "update it: pip install --upgrade tq-mcp"
        )
    return found


def _check_keys(what: str, values: Mapping[str, Any], expected: set[str]) -> None:
    wrong = [f"unknown {key!r}" for key in sorted(set(values) - expected)]
    wrong += [f"missing {key!r}" for key in sorted(expected - set(values))]
    if wrong:
        raise CorruptCheckpointError(
            f"{what} of config.json has {', '.join(wrong)}; it was edited, or made by another "
            "tool; convert the model again"
        )


def _entry(path: str, values: Mapping[str, Any]) -> ModuleEntry:
    _check_keys(f"module {path}", values, {field.name for field in fields(ModuleEntry)})
    entry = ModuleEntry(values["bits"], values["group_size"], values["block"], tuple(values["shape"]), values["qjl"])
    width = entry.shape[-1] if len(entry.shape) in (2, 3) else 0
    numbers = (entry.bits, entry.group_size, entry.block, *entry.shape)
    if any(type(n) is not int for n in numbers) or type(entry.qjl) is not bool:
        raise ValueError(f"module {path} has {dict(values)}")
    if entry.bits not in (1, 2, 3, 4) or width < 1 or min(entry.shape) < 1 or width % 32 or entry.block < 1:
        raise ValueError(f"module {path} has {dict(values)}")
    if entry.group_size and (entry.group_size < 0 or width % entry.group_size):
        raise ValueError(f"module {path} has groups of {entry.group_size} in a width of {width}")
    return entry
