"""Parity adapters of the segmentation losses, by group."""

from tests.parity.segmentation import adversary, data, dense, relations

ADAPTERS = dense.ADAPTERS | adversary.ADAPTERS | relations.ADAPTERS | data.ADAPTERS
