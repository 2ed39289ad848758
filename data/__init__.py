"""Data sets: token files and batches, tokenizers, and what prepares them (NAME/prepare.py)."""
