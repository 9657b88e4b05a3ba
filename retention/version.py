"""The version of the library, readable without importing torch."""

__version__ = "0.1.0"
