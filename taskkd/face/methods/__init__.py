"""The methods for face recognition, one file for each paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskkd.face.methods.ddl import ddl
from taskkd.face.methods.ec_kd import ec_kd
from taskkd.face.methods.ekd import ekd
from taskkd.face.methods.siamese_attention import siamese_attention
from taskkd.stages import Method

__all__ = [
    "METHODS",
    "ddl",
    "ec_kd",
    "ekd",
    "siamese_attention",
]

#: name -> `method(student, teacher, *, options) -> Method`
METHODS: dict[str, Callable[..., Method] | Any] = {
    "ddl": ddl,
    "ec_kd": ec_kd,
    "ekd": ekd,
    "siamese_attention": siamese_attention,
}
