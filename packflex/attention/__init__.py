"""Attention: one public op, `flex_attention`, over interchangeable backends that never import one another."""

from packflex.attention.api import flex_attention
from packflex.attention.explain import explain

__all__ = ["explain", "flex_attention"]
