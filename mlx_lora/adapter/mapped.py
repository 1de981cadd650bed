"""A safetensors file as NumPy arrays that are read when they are used: no copy, no MLX."""

import json
import mmap
from pathlib import Path

import numpy as np

from mlx_lora.errors import AdapterError

BF16 = np.dtype([("bf16", "<u2")])  # NumPy has no bfloat16: its bits, under a name of their own
KINDS = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": BF16,
}
EPS = {BF16: 2.0**-7, **{d: float(np.finfo(d).eps) for d in KINDS.values() if d != BF16}}
AGAIN = "Is the file complete? Copy or download it again."
LONGEST = 100_000_000  # bytes of a header, safetensors' own limit


def mapped(path: Path) -> dict[str, np.ndarray]:
    """The tensors by name, as views of the file. AdapterError says how a file is broken."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
            length = int.from_bytes(held[:8], "little")
            if not 2 <= length <= min(LONGEST, len(held) - 8):
                raise AdapterError(
                    f"{path} is no safetensors file, or only the start of one", AGAIN
                )
            header = json.loads(bytes(held[8 : 8 + length]))
            data = np.asarray(np.memmap(path, np.uint8, "r"))[8 + length :]
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} is not a sound safetensors file: {error}", AGAIN) from error
    if not isinstance(header, dict):
        raise AdapterError(f"{path} is no safetensors file: its header is no mapping", AGAIN)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    problems = [f"  {n}: {why}" for n, e in entries.items() if (why := unsound(e, len(data)))]
    if problems:
        more = [f"  ... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise AdapterError(
            f"{path} cannot be read\n" + "\n".join([*problems[:5], *more]),
            AGAIN,
        )
    return {name: view(data, entry) for name, entry in entries.items()}


def unsound(entry: object, size: int) -> str:
    """Why a header's entry cannot be a tensor of a file with so many bytes; empty when it can."""
    try:
        begin, end = entry["data_offsets"]  # type: ignore[index]
        kind, shape = entry["dtype"], tuple(entry["shape"])  # type: ignore[index]
        if kind not in KINDS:
            return f"its type {kind} is none of {', '.join(KINDS)}"
        wanted = KINDS[kind].itemsize * int(np.prod(shape, dtype=np.int64))
        if end - begin != wanted or begin < 0:
            return f"its place in the file does not fit its shape {shape}"
        return f"it ends {end - size:,} bytes after the file does" if end > size else ""
    except (KeyError, TypeError, ValueError):
        return "its entry in the header is not one of a tensor"


def view(data: np.ndarray, entry: dict) -> np.ndarray:
    begin, end = entry["data_offsets"]
    return data[begin:end].view(KINDS[entry["dtype"]]).reshape(entry["shape"])


def widened(x: np.ndarray) -> np.ndarray:
    """The same numbers in float64.

    >>> widened(np.array([0x3F80], "<u2").view(BF16)).tolist()
    [1.0]
    """
    if x.dtype == BF16:
        x = (x["bf16"].astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float64)
