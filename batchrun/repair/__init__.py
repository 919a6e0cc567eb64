"""Rebuilding a run from what is left of it: what the remains say (`evidence`), and the deeds (`repair`)."""
