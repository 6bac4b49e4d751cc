"""Hooks: they schedule, and hold no mathematics."""
