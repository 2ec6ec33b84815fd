"""Text to Megatron ``.bin/.idx`` token files, and token files to batches."""
