"""What was made, from what, how, how big, how good, how fast, and whether it is still intact."""

from registry.errors import RegistryError
from registry.files import Progress
from registry.layout import overlap
from registry.likeness import differences
from registry.query import FILTER_FIELDS, SORT_FIELDS, filter_help
from registry.records import (
    CacheComparisonRecord,
    EvaluationRecord,
    FileRecord,
    Model,
    ModelPage,
    ModelRecord,
    Parent,
    Problem,
    Recovery,
    Removal,
    SpeedRecord,
    Verification,
    recipe_sha256,
)
from registry.store import Registry, open_registry

__all__ = [
    "FILTER_FIELDS",
    "SORT_FIELDS",
    "CacheComparisonRecord",
    "EvaluationRecord",
    "FileRecord",
    "Model",
    "ModelPage",
    "ModelRecord",
    "Parent",
    "Problem",
    "Progress",
    "Recovery",
    "Registry",
    "RegistryError",
    "Removal",
    "SpeedRecord",
    "Verification",
    "differences",
    "filter_help",
    "open_registry",
    "overlap",
    "recipe_sha256",
]
