"""The model around a frozen encoder and a frozen LLM: configuration, inputs, source, generation, checkpoints."""
