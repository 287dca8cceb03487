"""Decisions, without torch: plans, budgets, shares of them, and how deep."""
