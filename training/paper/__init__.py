"""What the LLM4EHR paper printed, to be set beside our own numbers."""
