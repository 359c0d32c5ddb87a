"""LessIsMore sparse-attention decoding inside an unmodified SGLang."""

__version__ = "0.1.0"
