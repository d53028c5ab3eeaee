"""Training, evaluation and pictures of networks that detect objects."""
