"""The server's tools, one a file; `ALL` is the order in which agents see them."""

from tq_mcp.tools import (
    compare_kv_cache,
    convert_model,
    evaluate_ppl,
    generate,
    get_model,
    list_models,
    plan_conversion,
    verify_model,
)

ALL = (
    plan_conversion.TOOL,
    convert_model.TOOL,
    generate.TOOL,
    evaluate_ppl.TOOL,
    compare_kv_cache.TOOL,
    list_models.TOOL,
    get_model.TOOL,
    verify_model.TOOL,
)
