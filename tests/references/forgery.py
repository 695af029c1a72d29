"""What a stranger does to a run: files of any content, and digests that fit them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

CASTAGNOLI = 0x82F63B78


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def resign(checkpoint: Path, change: Callable[[dict], dict] = lambda record: record, *, relist: bool = True) -> None:
    """Write the manifest of a checkpoint anew.

    Args:
        checkpoint: Folder of the checkpoint.
        change: Changes the record.
        relist: List the files as they are now, before the change.
    """
    path = checkpoint / "MANIFEST"
    record = json.loads(path.read_bytes().partition(b"\n")[2])
    if relist:
        files = [p for p in sorted(checkpoint.rglob("*")) if p.is_file() and p != path]
        record["files"] = {str(p.relative_to(checkpoint)): sha256(p) for p in files}
        record["sizes"] = {str(p.relative_to(checkpoint)): p.stat().st_size for p in files}
    text = json.dumps(change(record)).encode()
    path.write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


def reseal(run: Path) -> None:
    """Write finished.json anew, with the digests of the files as they are."""
    seal = run / "finished.json"
    seal.write_text(json.dumps({name: sha256(run / name) for name in json.loads(seal.read_text())}))


def crc32c(content: bytes) -> int:
    """Castagnoli's checksum, with which OCDBT files end."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (CASTAGNOLI if byte & 1 else 0)
        table.append(byte)
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
