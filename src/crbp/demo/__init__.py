"""`crbp demo`: train a recurrent model with C-RBP beside one with BPTT, and show what each does step by step."""

from crbp.demo.command import main

__all__ = ["main"]
