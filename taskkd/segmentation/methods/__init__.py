"""The methods for segmentation networks, one file for each paper."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from taskkd.segmentation.methods.af_dcd import af_dcd
from taskkd.segmentation.methods.attention_transfer import attention_transfer
from taskkd.segmentation.methods.channel_wise import channel_wise
from taskkd.segmentation.methods.cirkd import cirkd
from taskkd.segmentation.methods.dist import dist
from taskkd.segmentation.methods.domain_adaptive import domain_adaptive
from taskkd.segmentation.methods.dsd import dsd
from taskkd.segmentation.methods.ifvd import ifvd
from taskkd.segmentation.methods.masked_generative import masked_generative
from taskkd.segmentation.methods.soft_targets import soft_targets
from taskkd.segmentation.methods.structured import structured
from taskkd.stages import Method

__all__ = [
    "METHODS",
    "af_dcd",
    "attention_transfer",
    "channel_wise",
    "cirkd",
    "dist",
    "domain_adaptive",
    "dsd",
    "ifvd",
    "masked_generative",
    "soft_targets",
    "structured",
]

#: name -> `method(student, teacher, *, options) -> Method`
METHODS: dict[str, Callable[..., Method] | Any] = {
    "af_dcd": af_dcd,
    "attention_transfer": attention_transfer,
    "channel_wise": channel_wise,
    "cirkd": cirkd,
    "dist": dist,
    "domain_adaptive": domain_adaptive,
    "dsd": dsd,
    "ifvd": ifvd,
    "masked_generative": masked_generative,
    "soft_targets": soft_targets,
    "structured": structured,
}
