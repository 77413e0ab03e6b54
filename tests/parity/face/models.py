"""Parity adapters of the face recognition package: models."""

from __future__ import annotations

from typing import Any

ADAPTERS: dict[str, Any] = {}
