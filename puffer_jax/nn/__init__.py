"""Layers and what they are made of: torch's names and layouts, initial weights, random numbers."""
