"""Slots: made for one model, and never mistaken for something of the user's."""

from pathlib import Path

import pytest

from registry import Registry, open_registry


def test_a_slot_is_on_the_disk_of_its_model_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    final = tmp_path / "new" / "place"
    with registry.staging("tiny", final) as staging:
        assert staging.name == "place"
        assert staging.parent.parent == final.parent
        assert not staging.exists()
        staging.mkdir()
        (staging / "half").write_text("")
    assert list(final.parent.iterdir()) == []
    assert list((registry.models_root / ".staging").iterdir()) == []


def test_only_slots_are_swept(registry: Registry) -> None:
    staging = registry.models_root / ".staging"
    (staging / "mine").mkdir()
    (staging / ("0" * 32)).mkdir()
    open_registry(registry.home).close()
    assert [path.name for path in staging.iterdir()] == ["mine"]


def test_a_slot_never_points_at_another_folder(registry: Registry, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    slot = registry.models_root / ".staging" / ("0" * 32)
    slot.mkdir()
    (slot / ".elsewhere").write_text(str(precious))
    open_registry(registry.home).close()
    assert precious.exists()
    assert not slot.exists()


def test_registries_that_make_a_model_for_the_same_place_have_a_slot_each(registry: Registry, tmp_path: Path) -> None:
    final = tmp_path / "new" / "place"
    with open_registry(tmp_path / "second") as second, registry.staging("place", final) as first:
        first.mkdir()
        with second.staging("place", final) as other:
            assert other.parent != first.parent
        assert first.exists()


def interrupted(registry: Registry, name: str, error: Exception, final: Path | None = None) -> Path:
    """Work that an error ends, with something beside the model; the path of that."""
    with pytest.raises(type(error)), registry.staging(name, final, resumable=(ConnectionError,)) as staging:
        staging.mkdir()
        beside = staging.with_name(".half")
        beside.mkdir()
        raise error
    return beside


@pytest.mark.parametrize("external", [False, True])
def test_work_that_can_go_on_stays_for_the_same_model(registry: Registry, tmp_path: Path, external: bool) -> None:
    final = tmp_path / "place" if external else None
    beside = interrupted(registry, "place", ConnectionError(), final)
    assert beside.exists() and not beside.with_name("place").exists()
    open_registry(registry.home).close()
    assert beside.exists()
    with registry.staging("place", final) as again:
        assert again.with_name(".half") == beside and beside.exists()
    assert not beside.exists()


def test_work_that_can_go_on_is_deleted_by_another_model(registry: Registry) -> None:
    beside = interrupted(registry, "place", ConnectionError())
    with registry.staging("other"):
        assert not beside.exists()


def test_work_that_cannot_go_on_is_deleted(registry: Registry) -> None:
    assert not interrupted(registry, "place", ValueError()).exists()
