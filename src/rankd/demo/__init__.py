"""The model that comes with the package, and the demo that serves it."""

from pathlib import Path

MODELS = Path(__file__).parent / "models"
"""A model repository with one model, `demo`, trained on the seeded synthetic log of `rankd.train.synthetic`."""
