"""Training, evaluation and export of a small language model of Python sources. Never imports sglang."""
