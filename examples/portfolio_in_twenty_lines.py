"""A portfolio layer in twenty lines: forecasts are learned through the investment they lead to."""

from __future__ import annotations

import cvxpy as cp
import torch
from torch import nn

from optrelax.layers import QuadraticProgram


def main(steps: int = 60) -> float:
    """Train a forecaster on realised utility; returns the gain over equal weights on held-out days."""
    torch.manual_seed(0)
    truth = torch.randn(4, 6, dtype=torch.float64) / 2
    signals = torch.randn(400, 4, dtype=torch.float64)
    returns = signals @ truth + 0.5 * torch.randn(400, 6, dtype=torch.float64)
    forecast, weights = cp.Parameter(6), cp.Variable(6)
    utility = forecast @ weights - cp.sum_squares(weights)
    problem = cp.Problem(cp.Maximize(utility), [cp.sum(weights) == 1, weights >= 0])
    portfolio = QuadraticProgram.from_cvxpy(problem, [forecast], [weights])
    model = nn.Linear(4, 6).double()
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        (held,) = portfolio(model(signals[:300]))
        loss = (held.square().sum(-1) - (held * returns[:300]).sum(-1)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    (held,) = portfolio(model(signals[300:]))
    gain = float(((held - 1 / 6) * returns[300:]).sum(-1).mean().detach())
    print(f"return a day above equal weights, held out: {gain:.3f}")
    return gain


if __name__ == "__main__":
    main()
