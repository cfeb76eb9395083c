"""Thin, typed faces of Linux system calls that Python's standard library lacks; each raises OSError."""
