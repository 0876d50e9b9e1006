"""Reads files of `torch.save`, which may be anybody's."""

import zipfile
from pathlib import Path
from typing import Any

import torch

_ZIP = b"PK\x03\x04"


def read_torch_file(path: Path) -> Any:
    """What a file holds, on the CPU: tensors and plain values, read without running code.

    Raises:
        pickle.UnpicklingError: It holds other things, or is damaged.
        ValueError: It would unpack to more than the file has bytes: `torch.save` compresses nothing.
        Exception: It is damaged, which torch finds in many ways.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            with zipfile.ZipFile(file) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            size = path.stat().st_size
            if unpacked > size:
                raise ValueError(f"its {size} bytes unpack to {unpacked}: expected a file as torch.save writes it")
    return torch.load(path, map_location="cpu", weights_only=True)
