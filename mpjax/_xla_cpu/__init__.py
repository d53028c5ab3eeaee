"""Forms and hints that only XLA:CPU needs; they change no more than a rounding.

How fast XLA:CPU runs a matmul, a convolution or a half sum depends on the form in which
it is written; on other devices XLA simplifies the form away, or does not see it.
`MPJAX_XLA_CPU_FORMS=0` in the environment, read at import, turns all of this off, to
measure what a form gains or to see whether it causes a fault.
"""
