"""The version of the package, for those of its files that the package itself imports."""

__version__ = "0.2.0"
