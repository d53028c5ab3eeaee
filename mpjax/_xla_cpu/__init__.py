"""Forms and hints that only XLA:CPU needs; they change no value.

Which form a matmul or a convolution is written in decides what XLA:CPU makes of it; on
other devices XLA takes the form away. `MPJAX_XLA_CPU_FORMS=0` in the environment, read
at import, turns all of it off: to see what a form is worth, or whether it is at fault.
"""
