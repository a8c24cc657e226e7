"""A training loop of your own through linear programs, in twenty lines: the triangle layer, a loss, warm starts.

python examples/triangle_in_twenty_lines.py --epochs 20
"""

import argparse

import torch

import optrelax as ox
from optrelax.layers import DualAscent, Status, Triangle
from optrelax.output.tables import text_table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=20)
epochs = parser.parse_args().epochs

batches = torch.utils.data.DataLoader(ox.load_dataset("digits", split="train"), batch_size=50)
net = ox.models.fc(64, 50, 50, 10, seed=0)  # or any nn.Module of supported ops
optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
layer = Triangle(solver=DualAscent(max_iterations=4))  # an unfinished LP has a valid bound, and says how loose
last = {}  # solution of each batch in the epoch before: a better start than none, as weights move little
for epoch in range(epochs):
    eps = 0.05 * min(1.0, 2 * epoch / epochs)  # pixels lie in [0, 1]
    for i, (x, labels) in enumerate(batches):
        region = ox.LinfBall(x, eps, clip=(0.0, 1.0))
        sol = layer.solve(net, region, ox.margins(labels, classes=10), start=last.get(i))
        optimizer.zero_grad()
        ox.certified_cross_entropy(sol.lower).backward()  # through the optimal values of 450 LPs
        optimizer.step()
        last[i] = sol
    unfinished = (sol.status != Status.OPTIMAL).sum()
    print(
        f"epoch {epoch + 1}: eps {eps:.3f}, {unfinished} of the last {sol.status.numel()} LPs unfinished, "
        f"largest gap {sol.gap.max():.1e} logits"
    )

report = ox.certify(net, ox.load_dataset("digits"), 0.05, relaxation=["box", "crown", "triangle:preactivation=crown"])
print(report, text_table(report.table()), sep="\n")
