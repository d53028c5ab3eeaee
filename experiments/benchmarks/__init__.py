"""Benchmarks of mpjax beside other libraries."""
