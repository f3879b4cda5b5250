"""What a model folder says, before any framework has read it."""
