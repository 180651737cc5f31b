"""Packing: which documents share a row (`PackingPlan`), by what strategy, and in what order rows are seen."""

from packflex.packing.order import EpochOrder, balanced_order, rank_imbalance, row_costs, row_order
from packflex.packing.plan import PackingPlan
from packflex.packing.strategies import STRATEGIES, best_fit, best_fit_patterns, next_fit, plan_rows, wrapped

__all__ = [
    "STRATEGIES",
    "EpochOrder",
    "PackingPlan",
    "balanced_order",
    "best_fit",
    "best_fit_patterns",
    "next_fit",
    "plan_rows",
    "rank_imbalance",
    "row_costs",
    "row_order",
    "wrapped",
]
