"""Evaluation protocols and reports; numpy only."""
