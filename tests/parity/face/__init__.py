"""Parity adapters of face recognition, by group."""

from tests.parity.face import centres, data, heads, models, pairs

ADAPTERS = heads.ADAPTERS | centres.ADAPTERS | pairs.ADAPTERS | data.ADAPTERS | models.ADAPTERS
