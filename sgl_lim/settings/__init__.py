"""Configuration, flags, refusals, presets: what is served, and whether it can be."""
