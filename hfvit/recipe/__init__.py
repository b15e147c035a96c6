"""From a YAML file and the command line to checked arguments."""
