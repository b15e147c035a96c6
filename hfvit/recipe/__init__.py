"""Recipes: YAML files and command-line options."""
