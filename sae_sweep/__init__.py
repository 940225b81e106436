"""Feature-splitting sweeps: toy models, stacked sparse autoencoders, exact ground truth."""

__version__ = "0.1.0"
