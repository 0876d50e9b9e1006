"""Plain tars for tests, made by the standard library, block by block where they must be wrong."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gcahng.data.stores.local import LocalStore
from gcahng.data.tars.members import Member, TarMembers

Files = Sequence[tuple[str, bytes]]


def picture(seed: int, kind: str = "JPEG") -> bytes:
    """An encoded image of noise; its size depends on the seed."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (24, 20 + seed % 9, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file. One that stays open warns when it is collected."""
    with np.load(path) as saved:  # allow_pickle is False
        return dict(saved)


def entry(name: str, size: int = 0, **attributes: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    return info


def blocks(info: tarfile.TarInfo, content: bytes = b"", tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    """One member as it stands in a tar."""
    return info.tobuf(tar_format) + content + bytes(-len(content) % 512)


def write_tar(path: Path, files: Files | Mapping[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    pairs = files.items() if isinstance(files, Mapping) else files
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in pairs:
            tar.addfile(entry(name, len(content)), io.BytesIO(content))
    return path


def open_tar(path: Path, **options: int) -> TarMembers:
    return TarMembers(LocalStore(path.parent), path.name, location=str(path), **options)


def read_tar(path: Path, **options: int) -> list[tuple[Member, bytes]]:
    tar = open_tar(path, **options)
    return [(member, tar.content() if member.size else b"") for member in tar]
