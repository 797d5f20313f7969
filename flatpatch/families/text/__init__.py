"""Repositories driven by shell scripts around Hugging Face's Trainer."""
