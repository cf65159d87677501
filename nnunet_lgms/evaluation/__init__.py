"""Predictions against references: metrics in mm, intervals, tests, tables and one HTML report."""
