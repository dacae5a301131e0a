"""Shared nouns: what every other part of quantkit speaks of."""
