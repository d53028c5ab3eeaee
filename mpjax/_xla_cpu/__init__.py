"""Forms and hints that only XLA:CPU needs; they change no value.

How fast XLA:CPU runs a matmul or a convolution depends on the form in which it is
written; on other devices XLA simplifies the form away. `MPJAX_XLA_CPU_FORMS=0` in the
environment, read at import, turns all of this off, to measure what a form gains or to
see whether it causes a fault.
"""
