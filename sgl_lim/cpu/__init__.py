"""SGLang's platform for a machine without an accelerator."""
