"""Parity adapters of the face recognition package: data."""

from __future__ import annotations

from typing import Any

ADAPTERS: dict[str, Any] = {}
