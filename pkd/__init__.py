"""Pyramid knowledge distillation across GPUs."""

__version__ = "0.1.0"
