"""Adapters to mmengine's training loop."""
