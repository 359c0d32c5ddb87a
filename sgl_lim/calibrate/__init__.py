"""Finds the layers that should select on a checkpoint, by what the model says with them."""
