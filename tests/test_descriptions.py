"""What is read of a folder's description, and what of it is an error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from taskkd.descriptions import read_description, write_description
from taskkd.errors import DataError
from taskkd.schema import Model


class Network(Model):
    layers: int = 1
    width: int = 8


def made(data: Mapping[str, Any]) -> tuple[Any, ...]:
    return data["kind"], data["config"], tuple(data["mean"])


def test_a_description_is_read_as_written_without_defaults(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "own.json"
    write_description(path, "Net", Network(width=3), mean=(0.5, 0.25))
    assert read_description(path, "a network", made) == ("Net", {"width": 3}, (0.5, 0.25))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not a network's description: JSONDecodeError"),
        ("[]", "is not a network's description: TypeError"),
        ('{"format": 1, "kind": "Net", "config": null}', "is not a network's description: KeyError: 'mean'"),
        (json.dumps({"format": 2}), r"has format 2, this version of taskkd reads 1\.$"),
    ],
)
def test_what_is_none_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(DataError, match=f"own.json {said}"):
        read_description(tmp_path / "own.json", "a network", made)
    with pytest.raises(DataError, match=r"none.json is not a network's description: FileNotFoundError"):
        read_description(tmp_path / "none.json", "a network", made)
