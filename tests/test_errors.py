"""Errors carry an exit code and the nearest names."""

from __future__ import annotations

import pytest

from taskkd import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.TaskkdError, 2),
        (errors.TapError, 2),
        (errors.ShapeError, 2),
        (errors.RecipeError, 2),
        (errors.DataError, 3),
        (errors.CheckpointError, 3),
        (errors.CacheError, 3),
        (errors.NonFiniteError, 4),
    ],
)
def test_exit_codes(error: type[errors.TaskkdError], code: int) -> None:
    assert error("a sentence").exit_code == code
    assert issubclass(error, errors.TaskkdError)


def test_an_error_of_a_worker_is_its_sentence() -> None:
    from torch._utils import ExceptionWrapper

    try:
        raise errors.DataError("a.png: the image cannot be read: it is truncated.")
    except errors.DataError:
        handed = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(errors.DataError) as found:
        handed.reraise()
    assert str(found.value) == "a.png: the image cannot be read: it is truncated."
    assert "test_errors.py" in found.value.__notes__[0]


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        ("temprature", ["temperature", "dim"], " (did you mean 'temperature'?)"),
        ("layer.3", ["encoder.layer.3", "x"], " (did you mean 'encoder.layer.3'?)"),
        ("zzz", ["temperature"], ""),
        ("a", [], ""),
        ("ab", ["abc", "abd", "abe", "abf"], " (did you mean 'abf', 'abe', 'abd'?)"),
    ],
)
def test_nearest(name: str, known: list[str], sentence: str) -> None:
    assert errors.nearest(name, known) == sentence
