"""Crossbatch fine-tuning (arXiv 2307.03170, section 3.2)."""
