"""Floor 6: entries for models that other frameworks build: Megatron-LM's ``pretrain`` and Megatron-Bridge."""
