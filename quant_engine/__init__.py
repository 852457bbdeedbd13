"""TurboQuant for MLX models: convert, load, evaluate, and compressed key-value caches."""

from quant_engine.config import CacheConfig, QuantConfig
from quant_engine.convert import ConversionResult, convert
from quant_engine.evaluate import EvaluationReport, evaluate
from quant_engine.export import ExportResult, export
from quant_engine.kv_cache import TurboQuantKVCache, convert_cache_to_turboquant
from quant_engine.loader import load
from quant_engine.plan import Plan, plan

__all__ = [
    "CacheConfig",
    "ConversionResult",
    "EvaluationReport",
    "ExportResult",
    "Plan",
    "QuantConfig",
    "TurboQuantKVCache",
    "convert",
    "convert_cache_to_turboquant",
    "evaluate",
    "export",
    "load",
    "plan",
]
