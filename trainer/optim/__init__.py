"""Optimizers, built from the recipe.

All of them keep to one protocol. `group["lr"]` is a float that is set before every step. State is there from the
start, as zeros, in `optimizer.state[parameter]`, with keys that stay and the parameter's memory format. Where
`optimizer.found_inf` (0-dim float32, as `torch.amp.GradScaler` sets it) is 1, a step leaves parameters and state as
they are, to the bit, whatever the gradients hold; torch's fused kernels look at it on the device, so that no step
waits for the host. Gradients are spent: after a step their values mean nothing.
"""

from trainer.optim.build import build_optimizer

__all__ = ["build_optimizer"]
