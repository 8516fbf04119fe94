"""What a training step needs of a GPU's memory, before there is a GPU, or weights, or data."""

from e3va.budget.cards import Card, card
from e3va.budget.report import Budget, Setup, advice, budget, warn
from e3va.budget.shapes import ShapesOnly

__all__ = ["Budget", "Card", "Setup", "ShapesOnly", "advice", "budget", "card", "warn"]
