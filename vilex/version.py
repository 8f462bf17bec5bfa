"""The version, in a module of its own so that building a package need not import torch."""

__version__ = "0.2.0"
