"""The recipes: what a run does. In a checkout they are in ``configs/``."""
