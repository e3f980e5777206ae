"""Searches by trials: cells as choices, strategies that say what to train next, and what carries it out."""
