"""Judging a forecast table: naive baselines beside it, metrics, plots."""
