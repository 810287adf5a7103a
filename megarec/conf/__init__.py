"""The yaml presets that hydra composes."""
