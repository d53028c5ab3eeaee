"""Datasets, fetched once and fed from memory."""
