"""Embedding files: every layout read without torch and without running a pickle, one normal form written."""
