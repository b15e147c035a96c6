"""timm networks as transformers models."""
