"""Parity adapters of the detection losses, by group."""

from tests.parity.detection import dense, detr, features, response

ADAPTERS = features.ADAPTERS | response.ADAPTERS | dense.ADAPTERS | detr.ADAPTERS
