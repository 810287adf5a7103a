"""megarec: model-parallel training of recommender transformers, from event logs to served models."""

__version__ = "0.1.0"
