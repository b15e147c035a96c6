"""Freeze the backbone or the first blocks, and keep frozen modules in eval mode."""

from torch import nn


class FrozenParts:
    """Mixin of a module: those within it that have weights and train none of them stay in evaluation mode."""

    _frozen_modules: tuple[nn.Module, ...] = ()

    def rest_frozen(self) -> None:
        """Put modules without a weight that trains into evaluation mode, for good: no dropout, no new statistics."""
        within = ((module, list(module.parameters())) for module in self.modules() if module is not self)
        self._frozen_modules = tuple(m for m, own in within if own and not any(p.requires_grad for p in own))
        self.train(self.training)

    def train(self, mode: bool = True):
        """Frozen modules stay in evaluation mode: no dropout, no moving statistics."""
        super().train(mode)
        for module in self._frozen_modules:
            module.eval()
        return self
