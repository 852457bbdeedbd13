"""TurboQuant for MLX models: convert, load, evaluate, and compressed key-value caches."""

from quant_engine.config import CacheConfig, QuantConfig
from quant_engine.convert import ConversionResult, convert
from quant_engine.plan import Plan, plan

__all__ = ["CacheConfig", "ConversionResult", "Plan", "QuantConfig", "convert", "plan"]
