"""Training, evaluation and export of the chain-tracing model (`models/chain-tracer`). Never imports sglang."""
