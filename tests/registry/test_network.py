"""Recognising network file systems from the tables of mounts."""

import subprocess
import sys
from pathlib import Path

import pytest

from registry import network
from registry.network import file_system, mounts, network_file_system, parse_mount, parse_proc

PROC = """/dev/vda / ext4 rw 0 0
server:/export /users nfs4 rw,vers=4.2 0 0
/dev/vdb /users/me/local xfs rw 0 0
//nas/share /mnt/my\\040share cifs rw 0 0
"""
MAC = """/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
//me@nas._smb._tcp.local/share on /Volumes/my share (smbfs, nodev, nosuid, mounted by me)
map auto_home on /System/Volumes/Data/home (autofs, automounted, nobrowse)
odd line
"""


def test_linux_mounts_are_read() -> None:
    found = parse_proc(PROC)
    assert found == {"/": "ext4", "/users": "nfs4", "/users/me/local": "xfs", "/mnt/my share": "cifs"}


def test_mac_mounts_are_read() -> None:
    found = parse_mount(MAC)
    assert found["/Volumes/my share"] == "smbfs"
    assert found["/"] == "apfs"
    assert len(found) == 3


def test_the_innermost_mount_counts() -> None:
    found = parse_proc(PROC)
    assert file_system(Path("/users/me/.tq"), found) == "nfs4"
    assert file_system(Path("/users/me/local/not/yet/there"), found) == "xfs"
    assert file_system(Path("/users2"), found) == "ext4"
    assert file_system(Path("/anything"), {}) is None


def test_only_network_types_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "mounts", lambda: parse_proc(PROC))
    assert network_file_system(Path("/users/me/.tq")) == "nfs4"
    assert network_file_system(Path("/var/tmp")) is None


def test_this_machine_has_a_root(tmp_path: Path) -> None:
    assert file_system(tmp_path, mounts()) is not None


def test_elsewhere_than_on_linux_the_mount_command_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess(["mount"], 0, stdout=MAC)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(network.subprocess, "run", lambda *_, **__: answer)
    assert mounts()["/Volumes/my share"] == "smbfs"
