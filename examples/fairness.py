"""Individual fairness: a decision that is the same for either sex and any age, proved for each person.

The data are the 442 patients that scikit-learn ships (Efron et al. 2004): age, sex, eight blood and body measurements,
and how far diabetes went a year later. A small network decides who is above the median, and so needs more care. It is
trained plainly, and against every sex, every age of the data and small changes of the measurements, by three
relaxations. A person is treated fairly where no such change turns the decision: sex takes its two values, a
`ChoiceBox`, of which relaxations bound the hull and a MILP solver settles the rest, choice by choice.

    python examples/fairness.py --epochs 60
"""

import argparse

import polars as pl
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import optrelax as ox
from optrelax.output.tables import text_table
from optrelax.training.schedules import LinearRamp

AGE, SEX = 0, 1
SMALL = 0.05  # of the measurements, in standard deviations


def patients() -> tuple[Tensor, Tensor]:
    """Standardised measurements [442, 10] with sex 0 or 1, and whether the disease went on [442]."""
    data = load_diabetes(scaled=False)
    x = torch.from_numpy(data.data).float()
    sex = x[:, SEX] - 1
    x = (x - x.mean(0)) / x.std(0)
    x[:, SEX] = sex
    y = torch.from_numpy(data.target)
    return x, (y > y.median()).long()


def alike(x: Tensor, ages: Tensor) -> ox.ChoiceBox:
    """All who count as the same person, a region each: of either sex, of any age, much like them in the rest."""
    lower, upper = x - SMALL, x + SMALL
    lower[:, AGE], upper[:, AGE] = ages.aminmax()
    return ox.ChoiceBox(lower, upper, {SEX: torch.tensor([0.0, 1.0])})


def train(relaxation: str | None, x: Tensor, labels: Tensor, ages: Tensor, epochs: int) -> nn.Module:
    """A network of two hidden layers; without a relaxation on the patients alone."""
    net = ox.models.fc(10, 20, 20, 2, seed=0)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, weight_decay=1e-3)
    kappa = LinearRamp(1.0, 0.2, begin=0.0, length=epochs / 2)  # weight of the natural loss
    for epoch in range(epochs):
        for index in torch.randperm(len(x), generator=order).split(100):
            weight = 1.0 if relaxation is None else kappa(epoch)
            loss = ox.CertifiedLoss(relaxation or "box", kappa=weight)
            terms = loss(net, alike(x[index], ages), labels[index], x[index])
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()
    return net


def main() -> None:
    """Train four networks, and prove for each person of the test set what can be proved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    epochs = parser.parse_args().epochs

    x, labels = patients()
    ages = x[:, AGE].clone()
    test = torch.arange(len(x)) % 5 == 4
    table = []
    for relaxation in (None, "box", "crown", "triangle"):
        net = train(relaxation, x[~test], labels[~test], ages, epochs)
        decisions = net(x[test]).argmax(1)
        row: dict[str, object] = {"training": relaxation or "plain"}
        row["accuracy %"] = 100 * float((decisions == labels[test]).double().mean())
        region = alike(x[test], ages)
        names = ["box", "crown", "triangle"]
        report = ox.certify(net, (x[test], decisions), region=region, relaxation=names, exact=True)
        row |= {f"fair % by {name}": 100 * share for name, share in report.certified_by.items()}
        row["fair %"] = 100 * (report.certified + report.certified_milp)  # each choice by itself, not their hull
        row["unfair %, at least"] = 100 * report.attacked
        table.append(row)
    frame = pl.DataFrame(table)
    print(text_table(frame, decimals=dict.fromkeys(frame.columns[1:], 1)))
    majority = 100 * float(labels[test].bincount().max() / int(test.sum()))
    print(f"{int(test.sum())} people; a decision by majority is right for {majority:.1f} %")


if __name__ == "__main__":
    main()
