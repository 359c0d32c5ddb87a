"""The lossless mode: sparse decode drafts, a dense pass of the same weights over the same KV verifies."""
