"""Publishing, verifying and removing: folders go to their place and leave it with their record."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from registry import FileRecord, Model, ModelRecord, Registry, RegistryError, open_registry

Publish = Callable[..., Model]
Record = Callable[..., ModelRecord]
Fill = Callable[..., Path]


def kinds(registry: Registry) -> list[tuple[str, str]]:
    return [(problem.kind, problem.path) for problem in registry.verify("tiny-tq3").problems]


def test_a_flipped_bit_a_missing_and_a_foreign_file_are_found(registry: Registry, publish: Publish) -> None:
    model = publish()
    assert registry.verify("tiny-tq3").ok
    weights = model.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 4
    weights.write_bytes(content)
    assert kinds(registry) == [("changed", "model.safetensors")]
    (model.path / "config.json").unlink()
    (model.path / "a" / "extra.py").write_text("")
    assert kinds(registry) == [
        ("foreign", "a/extra.py"),
        ("missing", "config.json"),
        ("changed", "model.safetensors"),
    ]


def test_a_shorter_file_and_a_link_in_its_place_are_found(registry: Registry, publish: Publish) -> None:
    model = publish()
    weights = model.path / "model.safetensors"
    os.truncate(weights, 10)
    weights.with_name("config.json").unlink()
    weights.with_name("config.json").symlink_to(weights)
    (model.path / "linked").symlink_to(model.path / "a")
    (model.path / ".DS_Store").write_text("left by Finder")
    problems = registry.verify("tiny-tq3").problems
    assert [(p.kind, p.path) for p in problems] == [
        ("changed", "config.json"),
        ("foreign", "linked"),
        ("changed", "model.safetensors"),
    ]
    assert "10 bytes, 5120 expected" in problems[-1].detail


def test_a_folder_that_is_gone_is_a_model_without_files(registry: Registry, publish: Publish) -> None:
    publish().path.rename(registry.home / "elsewhere")
    assert {kind for kind, _ in kinds(registry)} == {"missing"}


def test_progress_counts_bytes_and_stops_the_work(registry: Registry, publish: Publish) -> None:
    model = publish()
    calls: list[tuple[int, int, str]] = []
    registry.verify("tiny-tq3", lambda done, total, name: calls.append((done, total, name)))
    assert calls[-1][:2] == (model.size_bytes, model.size_bytes)

    def stop(_done: int, _total: int, _name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.verify("tiny-tq3", stop)


def test_removing_takes_the_record_and_the_folder(registry: Registry, publish: Publish) -> None:
    model = publish()
    registry.set_alias("best", "tiny-tq3")
    plan = registry.remove("best", dry_run=True)
    assert (plan.name, plan.files, plan.size_bytes, plan.foreign) == ("tiny-tq3", 3, model.size_bytes, ())
    assert registry.verify("tiny-tq3").ok
    assert not registry.remove("best").dry_run
    assert registry.find("tiny-tq3") is None
    assert os.listdir(registry.models_root) == [".staging"]
    assert os.listdir(registry.models_root / ".staging") == []
    publish()


def test_a_folder_with_foreign_files_is_removed_only_by_force(registry: Registry, publish: Publish) -> None:
    path = publish().path
    (path / "notes.txt").write_text("mine")
    assert registry.remove("tiny-tq3", dry_run=True).foreign == ("notes.txt",)
    with pytest.raises(RegistryError, match=r"notes\.txt"):
        registry.remove("tiny-tq3")
    assert (path / "notes.txt").exists()
    registry.remove("tiny-tq3", force=True)
    assert not path.exists()


def test_a_model_whose_folder_is_gone_can_be_removed(registry: Registry, publish: Publish) -> None:
    publish().path.rename(registry.home / "elsewhere")
    registry.remove("tiny-tq3")
    assert registry.models().total == 0
    with pytest.raises(RegistryError, match="no model"):
        registry.remove("tiny-tq3")


def test_a_folder_that_cannot_be_moved_stays_with_its_record(
    registry: Registry, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        with pytest.raises(RegistryError, match="cannot be removed: Permission denied"):
            registry.remove("tiny-tq3")
        assert registry.verify("tiny-tq3").ok
        with pytest.raises(RegistryError, match=r"Permission denied.*Nothing was registered"):
            publish("other")
    assert registry.find("other") is None
    publish("other")


def refuse(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_files_that_cannot_be_deleted_now_are_deleted_later(
    registry: Registry, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish()
    with monkeypatch.context() as patched:
        patched.setattr("registry.publishing.discard", lambda _: None)
        with pytest.raises(RegistryError, match="is tried again"):
            registry.remove("tiny-tq3")
        assert registry.find("tiny-tq3") is None
    with open_registry(registry.home) as again:
        assert [(r.name, r.action) for r in again.recovered] == [("tiny-tq3", "removed")]
        assert os.listdir(registry.models_root / ".staging") == []


def test_a_model_may_live_where_the_user_wants_it(registry: Registry, publish: Publish, tmp_path: Path) -> None:
    place = tmp_path / "mine" / "quantized"
    model = publish(final=place)
    assert model.external
    assert model.path == place
    assert os.listdir(tmp_path / "mine") == ["quantized"]
    registry.remove("tiny-tq3")
    assert os.listdir(tmp_path / "mine") == []


def test_a_folder_already_in_its_place_is_registered_there(
    registry: Registry, record: Record, fill: Fill, tmp_path: Path
) -> None:
    place = fill(tmp_path / "mine")
    model = registry.publish(record(), place, place)
    assert model.path == place
    assert registry.verify("tiny-tq3").ok


def test_files_given_are_believed_after_their_sizes_were_checked(
    registry: Registry, record: Record, fill: Fill
) -> None:
    with registry.staging("tiny-tq3") as staging:
        fill(staging, {"w": b"12"})
        for wrong in ([], [FileRecord(path="w", size_bytes=3, sha256="0")]):
            with pytest.raises(RegistryError, match="files given are not those"):
                registry.publish(record(), staging, files=wrong)
        given = FileRecord(path="w", size_bytes=2, sha256="0" * 64)
        assert registry.publish(record(), staging, files=[given]).files == (given,)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../up", ".hidden", "a b", "x" * 97, "ü", "a\n"])
def test_names_that_are_no_folder_names_are_refused(registry: Registry, publish: Publish, name: str) -> None:
    with pytest.raises(RegistryError, match="is not a model name"):
        publish(name)
    with pytest.raises(RegistryError, match="is not a model name"):
        registry.require_free(name)


def test_a_taken_name_or_place_is_refused_before_and_when_publishing(
    registry: Registry, publish: Publish, record: Record, fill: Fill, tmp_path: Path
) -> None:
    publish(final=tmp_path / "mine")
    for name, final in (("TINY-tq3", None), ("b", tmp_path / "mine"), ("c", tmp_path / "mine" / "in")):
        with pytest.raises(RegistryError, match=r"taken|overlaps"):
            registry.require_free(name, final)
        with pytest.raises(RegistryError, match=r"taken|overlaps"):
            registry.publish(record(name), fill(tmp_path / "staged"), final)
    fill(registry.models_root / "squatter")
    with pytest.raises(RegistryError, match="exists already"):
        registry.require_free("squatter")
    with pytest.raises(RegistryError, match="exists already"):
        registry.publish(record("squatter"), tmp_path / "staged")
    assert registry.require_free("free") == registry.models_root / "free"
    assert registry.models().total == 1


def test_places_inside_the_models_root_belong_to_the_registry(registry: Registry) -> None:
    for place in (registry.models_root / "other", registry.models_root / ".staging" / "x", registry.home):
        with pytest.raises(RegistryError, match="is not a place for the model"):
            registry.require_free("tiny-tq3", place)


def test_what_is_no_folder_of_plain_files_is_refused(
    registry: Registry, record: Record, fill: Fill, tmp_path: Path
) -> None:
    with pytest.raises(RegistryError, match="is not a folder"):
        registry.publish(record(), tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RegistryError, match="no files"):
        registry.publish(record(), tmp_path / "empty")
    fill(tmp_path / "full").joinpath("link").symlink_to("config.json")
    with pytest.raises(RegistryError, match="not a plain file"):
        registry.publish(record(), tmp_path / "full")
    with pytest.raises(RegistryError, match="not a tag"):
        registry.publish(record(tags=("a b",)), tmp_path / "full")


class TestRecovery:
    """Of a publish that was cut short after its row was written."""

    @pytest.fixture
    def staged(
        self, registry: Registry, record: Record, fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Path:
        """Left, with its row, by an interruption just before the rename to a folder outside."""

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        folder = fill(tmp_path / "disk" / "staged")
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "rename", interrupt)
            registry.publish(record(), folder, tmp_path / "disk" / "final")
        assert registry.find("tiny-tq3") is None
        return folder

    @staticmethod
    def actions(home: Path) -> list[str]:
        with open_registry(home) as registry:
            return [recovery.action for recovery in registry.recovered]

    def test_whole_files_are_published(self, registry: Registry, staged: Path) -> None:
        assert self.actions(registry.home) == ["published"]
        assert registry.verify("tiny-tq3").ok

    def test_files_that_are_not_whole_are_rolled_back(self, registry: Registry, staged: Path) -> None:
        (staged / "config.json").unlink()
        assert self.actions(registry.home) == ["rolled back"]
        assert not staged.exists()
        registry.require_free("tiny-tq3")

    def test_a_disk_that_is_away_is_waited_for(self, registry: Registry, staged: Path) -> None:
        staged.parent.rename(registry.home / "away")
        assert self.actions(registry.home) == ["left"]
        (registry.home / "away").rename(staged.parent)
        assert self.actions(registry.home) == ["published"]

    def test_a_disk_that_will_not_return_can_be_given_up(self, registry: Registry, staged: Path) -> None:
        staged.parent.rename(registry.home / "away")
        registry.remove("tiny-tq3")
        assert self.actions(registry.home) == []
        registry.require_free("tiny-tq3")

    def test_a_folder_that_refuses_is_left_and_the_registry_opens(
        self, registry: Registry, staged: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("registry.publishing.compare_sizes", refuse)
        assert self.actions(registry.home) == ["left"]
        assert staged.exists()
