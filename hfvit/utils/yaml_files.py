"""Read YAML safely."""

from typing import Any

import yaml


class _PlainLoader(yaml.SafeLoader):
    """Load YAML like `safe_load`, but reject repeated keys and aliases."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not supported; write out the value")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        for key, _ in getattr(node, "value", ()):
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"{key.value} is repeated")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """Load YAML without aliases (which may expand exponentially) and repeated keys.

    Raises:
        yaml.YAMLError, ValueError, OverflowError, RecursionError: the text cannot be read.
    """
    return yaml.load(text, _PlainLoader)
