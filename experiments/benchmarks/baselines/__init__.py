"""The same training step by hand, by mpjax and by other libraries, to be timed."""
