"""The flags of every command; nothing here imports what is slow to import.

A command reads its flags before it imports anything else, so that `--help` and a typo
are answered at once.
"""
