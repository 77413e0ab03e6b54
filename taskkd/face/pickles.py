"""Pickles of verification sets (.bin), read without executing anything of them."""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from taskkd.errors import DataError
from taskkd.face.records import Array

__all__ = ["load_bin"]


class _RefusedError(Exception):
    """What a file asks for and does not get."""


class _Type:
    """Stands for `numpy.dtype`: its name alone is kept."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.name = code.decode("ascii", "replace") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: Any) -> None:
        """Byte order and fields, of which bytes and bools have none."""


class _Bytes:
    """Stands for `numpy.ndarray`: shape and bytes of an array of whole numbers of 8 bits or bools."""

    shape: tuple[int, ...] = ()
    content = b""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        self.fill(kind, shape, content, fortran)

    def fill(self, kind: Any, shape: Any, content: Any, fortran: Any = False) -> _Bytes:
        if not isinstance(kind, _Type) or kind.name not in ("u1", "b1", "|u1", "|b1", "uint8", "bool"):
            raise _RefusedError(f"an array of {getattr(kind, 'name', kind)!r}; images are arrays of u1 (uint8)")
        content = content.encode("latin1") if isinstance(content, str) else bytes(content)
        shape = tuple(int(side) for side in shape)
        if math.prod(shape) != len(content) or (fortran and len(shape) > 1):
            raise _RefusedError(f"an array {shape} of {len(content)} bytes, or one by columns")
        self.shape, self.content = shape, content
        return self


def _encode(text: Any, encoding: Any = "latin1", *_: Any) -> bytes:
    """Protocol 2 writes bytes as text of the same code points."""
    if not isinstance(text, str) or str(encoding).lower().replace("-", "") != "latin1":
        raise _RefusedError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


def _array(*_: Any) -> _Bytes:
    """`numpy.core.multiarray._reconstruct`, which makes an empty array."""
    return _Bytes()


def _buffer(content: Any, kind: Any, shape: Any, *_: Any) -> _Bytes:
    """`numpy.core.numeric._frombuffer` of protocol 5."""
    return _Bytes().fill(kind, shape, content)


def _scalar(kind: Any, content: Any = b"") -> int:
    """`numpy.core.multiarray.scalar`: a bool."""
    return int(any(_Bytes().fill(kind, (1,), content).content))


def _plain(content: Any = b"", *_: Any) -> bytes:
    """`bytes` and `bytearray`: protocol 2 calls the first without arguments for an empty one."""
    return bytes(content) if isinstance(content, bytes | bytearray) else _encode(content)


#: all that a file may name; none of it is what the name says, so that nothing of a file is executed
ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("builtins", "bytes"): _plain,
    ("builtins", "bytearray"): _plain,
    ("numpy", "ndarray"): _Bytes,
    ("numpy", "dtype"): _Type,
}
for _name in ("bytes", "bytearray"):
    ALLOWED["__builtin__", _name] = _plain  # as Python 2 calls the module
for _core in ("numpy.core", "numpy._core"):
    ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _array
    ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    ALLOWED[f"{_core}.numeric", "_frombuffer"] = _buffer


class _StandIn:
    """A callable that a file cannot change."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _RefusedError("it changes a function")


class _Unpickler(pickle._Unpickler):
    """The one in Python: a memo of the one in C grows to any number that a file of seven bytes names."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name."""
        if (module, name) not in ALLOWED:
            raise _RefusedError(
                f"it names {module}.{name}, which such a file has no need of; nothing of it was executed"
            )
        return _StandIn(ALLOWED[module, name])

    def persistent_load(self, key: Any) -> NoReturn:
        """No file of pairs has these."""
        raise _RefusedError("it refers to objects outside the file")


def load_bin(path: Path) -> tuple[list[Callable[[], bytes]], Array]:
    """What reads each encoded image of a verification set, and (P,) bool.

    Raises:
        DataError: the file is missing, damaged, or is no pickle of a list of images and a list of bools.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except _RefusedError as error:
        raise DataError(f"{path}: the file is refused: {error}.") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"{path}: the file is damaged or no pickle of pairs ({type(error).__name__}: {error})."
        ) from None
    images, same = _parts(path, content)
    readers = [_reader(path, number, image) for number, image in enumerate(images)]
    return readers, np.asarray([_truth(path, number, value) for number, value in enumerate(same)])


def _parts(path: Path, content: Any) -> tuple[list[Any], list[Any]]:
    """Both lists."""
    parts = list(content) if isinstance(content, list | tuple) and len(content) == 2 else []
    if parts and isinstance(parts[1], _Bytes):
        parts[1] = list(parts[1].content)
    if not parts or not all(isinstance(part, list | tuple) for part in parts):
        raise DataError(f"{path}: expected a pickle of two lists, of images and of whether pairs are of one person.")
    images, same = map(list, parts)
    if not same or len(images) != 2 * len(same):
        raise DataError(f"{path}: {len(images)} images and {len(same)} pairs: expected two images for each pair.")
    return images, same


def _truth(path: Path, number: int, value: Any) -> bool:
    if not isinstance(value, int):
        raise DataError(f"{path}: pair {number} is {type(value).__name__}, expected True or False.")
    return bool(value)


def _reader(path: Path, number: int, image: Any) -> Callable[[], bytes]:
    if isinstance(image, bytes | bytearray):
        return functools.partial(bytes, image)
    if isinstance(image, _Bytes) and len(image.shape) == 1:
        return functools.partial(bytes, image.content)
    if isinstance(image, _Bytes) and len(image.shape) == 3 and image.shape[2] == 3:
        return functools.partial(_portable, image.content, image.shape[1], image.shape[0])
    raise DataError(
        f"{path}: image {number} is {getattr(image, 'shape', type(image).__name__)}, expected the bytes of an image "
        "file, or pixels (H, W, 3) of uint8."
    )


def _portable(pixels: bytes, width: int, height: int) -> bytes:
    """A PPM file of pixels."""
    return b"P6 %d %d 255\n" % (width, height) + pixels
