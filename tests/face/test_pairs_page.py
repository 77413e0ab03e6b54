"""docs/methods/face-pairs.md: every option is there, and its batches can be made."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import taskkd as kd
from taskkd.face.methods import METHODS
from tests.face.test_batches import LABELS, Faces

PAGE = (Path(kd.__file__).parents[1] / "docs" / "methods" / "face-pairs.md").read_text()


@pytest.mark.parametrize("name", ["ddl", "ec_kd", "ekd", "siamese_attention"])
def test_the_page_names_every_option(name: str) -> None:
    section = PAGE.partition(f"\n## `{name}`")[2].partition("\n## ")[0]
    for option, parameter in inspect.signature(METHODS[name]).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert f"`{option}`" in section, option


def test_batches_of_ddl_are_made_as_written() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    names: dict[str, Any] = {
        "sizes": np.arange(60),
        "embeddings": torch.randn(60, 4, generator=torch.Generator().manual_seed(0)),
        "labels": LABELS,
        "dataset": Faces(),
    }
    exec(compile(code.replace("identity=32", "identity=8"), "the page", "exec"), names)
    assert names["hard"].sum() == 30
    assert len(names["data"][0]) == 2 * 8 + 4 * 32
