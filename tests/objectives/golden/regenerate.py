"""Computes the stored numbers anew with TRL's own code.

In an environment with torch and trl (jax is not needed): python -m tests.objectives.golden.regenerate
"""

import datetime
import importlib.metadata

import numpy as np
import torch

from tests.objectives.golden import offline, online
from tests.objectives.golden.inputs import CASES, make_inputs
from tests.objectives.golden.store import save

COMMAND = "python -m tests.objectives.golden.regenerate"


def main() -> None:
    """Writes the inputs, and each variant's losses and gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    arrays = make_inputs()
    inputs = {
        family: {name.split("/")[1]: value for name, value in arrays.items() if name.startswith(f"{family}/")}
        for family in {name.split("/")[0] for name in arrays}
    }
    for variant, family, run in (*offline.runs(), *online.runs()):
        losses, gradients = [], []
        for c in range(CASES):
            loss, variable = run({name: value[c] for name, value in inputs[family].items()})
            (gradient,) = torch.autograd.grad(loss, variable)
            losses.append(loss.detach().numpy())
            gradients.append(gradient.numpy())
        arrays[f"{variant}/loss"] = np.stack(losses).astype(np.float32)
        arrays[f"{variant}/gradient"] = np.stack(gradients).astype(np.float32)
    for name, values in online.extras(inputs):
        arrays[name] = values
    bad = [name for name, values in arrays.items() if not np.isfinite(values).all()]
    if bad:
        raise ValueError(f"not finite: {', '.join(bad)}")
    packages = ("trl", "torch", "transformers", "numpy")
    header = {package: importlib.metadata.version(package) for package in packages}
    header |= {"date": datetime.date.today().isoformat(), "command": COMMAND}
    print(f"{len(arrays)} arrays, {save(arrays, header)} bytes")


if __name__ == "__main__":
    main()
