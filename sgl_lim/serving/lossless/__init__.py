"""Lossless decode: sparse steps draft tokens, one dense pass verifies them, with the same weights and the same KV."""
