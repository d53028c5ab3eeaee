"""Speech: corpora, features, and batches for recognition by CTC."""
