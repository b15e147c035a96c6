"""Demos of a classifier: Gradio app and static page."""
