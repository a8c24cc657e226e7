"""Predict, then optimise: a knapsack's values learned through the decision beat values learned for themselves.

The true values are not linear in the features, the model is: a least-squares fit spends its capacity where decisions do
not depend on it, training through the relaxed integer program spends it on regret.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from optrelax.layers import LinearProgram, MixedIntegerProgram, Regularised

ITEMS, FEATURES, CAPACITY = 12, 5, 10.0


def knapsacks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features [count, items, features] and values [count, items]: a steep polynomial of a hidden direction."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, ITEMS, FEATURES, generator=generator, dtype=torch.float64)
    hidden = torch.linspace(-1, 1, FEATURES, dtype=torch.float64)
    score = features @ hidden
    return features, (0.3 * score + 1).clamp(min=0) ** 4 + 0.1 * features[..., 0].sin()


def regret(model: nn.Module, features: Tensor, values: Tensor, weights: Tensor) -> float:
    """Mean loss of value against the best choice, as a part of the best."""
    layer = MixedIntegerProgram(torch.ones(ITEMS, dtype=torch.bool))
    box = {"lower": torch.zeros(ITEMS, dtype=torch.float64), "upper": torch.ones(ITEMS, dtype=torch.float64)}
    side = torch.tensor([CAPACITY], dtype=torch.float64)
    with torch.no_grad():
        chosen = layer(-model(features)[..., 0], weights, side, **box).primal
        best = layer(-values, weights, side, **box).primal
    return float(((best - chosen) * values).sum() / (best * values).sum())


def main(steps: int = 60, count: int = 60) -> tuple[float, float]:
    """Returns the held-out regret of two-stage learning and of learning through the decision."""
    weights = torch.linspace(1, 4, ITEMS, dtype=torch.float64).unsqueeze(0)
    train, test = knapsacks(count, 0), knapsacks(40, 1)
    box = {"lower": torch.zeros(ITEMS, dtype=torch.float64), "upper": torch.ones(ITEMS, dtype=torch.float64)}
    relaxed = LinearProgram(primal_gradient=Regularised(1.0))
    found = []
    for through in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(FEATURES, 1).double()
        optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(steps if through else 5 * steps):
            predicted = model(train[0])[..., 0]
            if through:
                side = torch.tensor([CAPACITY], dtype=torch.float64)
                loss = -(relaxed(-predicted, weights, side, **box).primal * train[1]).sum(-1).mean()
            else:
                loss = (predicted - train[1]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found.append(regret(model, *test, weights))
    print(f"regret, held out: two-stage {found[0]:.1%}, through the decision {found[1]:.1%}")
    return found[0], found[1]


if __name__ == "__main__":
    main()
