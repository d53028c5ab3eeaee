"""The single-shot detector SSD, arXiv:1512.02325, in parts that jit takes."""
