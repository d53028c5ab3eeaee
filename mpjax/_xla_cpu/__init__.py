"""Forms and hints that only XLA:CPU needs; they change no value."""
