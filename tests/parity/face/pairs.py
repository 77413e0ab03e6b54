"""Parity adapters of the face recognition package: pairs."""

from __future__ import annotations

from typing import Any

ADAPTERS: dict[str, Any] = {}
