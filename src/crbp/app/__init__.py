"""`crbp app`: a page in the browser on which to watch trained models trace contours, step by step and side by side."""

from crbp.app.command import main

__all__ = ["main"]
