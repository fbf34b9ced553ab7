"""The version of fxlrp."""

__version__ = "0.1.0"
