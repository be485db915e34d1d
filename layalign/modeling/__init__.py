"""The whole model: frozen encoder and LLM, adapter, aligner, gates; configuration, inputs, source, checkpoints."""
