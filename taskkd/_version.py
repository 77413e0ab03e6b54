"""The version of taskkd."""

__version__ = "0.1.0"
