"""Publish runs on the Hugging Face Hub."""
