"""Parity adapters of the face recognition package: heads."""

from __future__ import annotations

from typing import Any

ADAPTERS: dict[str, Any] = {}
