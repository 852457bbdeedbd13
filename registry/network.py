"""Is a folder on a network file system? SQLite's write-ahead log needs memory shared between processes,
which those do not give."""

import os
import subprocess
import sys
from pathlib import Path

NETWORK_TYPES = frozenset(
    {
        *("nfs", "nfs3", "nfs4", "cifs", "smb2", "smb3", "smbfs", "afpfs", "webdav", "davfs", "afs"),
        *("fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.glusterfs", "lustre", "ceph", "beegfs", "gpfs"),
    }
)


def network_file_system(folder: Path) -> str | None:
    """The type of the network file system that holds `folder` (which may not exist yet), or None."""
    kind = file_system(folder, mounts())
    return kind if kind in NETWORK_TYPES else None


def file_system(folder: Path, mounted: dict[str, str]) -> str | None:
    """The type of the innermost of `mounted` (mount point -> type) that holds `folder`."""
    resolved = folder.resolve()
    inside = [point for point in mounted if resolved.is_relative_to(point)]
    return mounted[max(inside, key=len)] if inside else None


def mounts() -> dict[str, str]:
    if sys.platform == "linux":
        return parse_proc(Path("/proc/self/mounts").read_text(errors="replace"))
    listing = subprocess.run(["/sbin/mount"], capture_output=True, text=True, check=False, timeout=10)
    return parse_mount(listing.stdout)


def parse_proc(text: str) -> dict[str, str]:
    """Lines of /proc/mounts: device, mount point (spaces as \\040), type, options."""
    fields = [line.split() for line in text.splitlines()]
    return {os.fsdecode(f[1].encode().decode("unicode_escape").encode("latin-1")): f[2] for f in fields}


def parse_mount(text: str) -> dict[str, str]:
    """Lines of macOS's mount: `//me@host/share on /Volumes/share (smbfs, nodev)`."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        where, _, options = line.rpartition(" (")
        if " on " in where and options:
            found[where.split(" on ", 1)[1]] = options.rstrip(")").split(",")[0].strip()
    return found
