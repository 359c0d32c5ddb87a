"""Trains gates of SeerAttention-R for any checkpoint that sgl_lim.evaluate can decode. Never imports sglang."""
