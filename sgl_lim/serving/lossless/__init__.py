"""Lossless mode: sparse decode drafts tokens, one dense pass verifies them."""
