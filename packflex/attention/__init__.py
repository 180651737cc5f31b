"""Attention: one public op, `flex_attention`, over interchangeable backends that never import one another."""

from packflex.attention.api import flex_attention

__all__ = ["flex_attention"]
