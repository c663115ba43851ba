"""Whole models: what comes before and after a recurrent cell, and the baselines beside it."""

from crbp.models.feedforward import FeedForwardNet
from crbp.models.pathfinder import PathfinderNet, Prediction

__all__ = ["FeedForwardNet", "PathfinderNet", "Prediction"]
