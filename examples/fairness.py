"""Individual fairness: a decision that is the same for either sex and any age, proved for each person.

The data are the 442 patients that scikit-learn ships (Efron et al. 2004): age, sex, eight blood and body measurements,
and how far diabetes went a year later. A small network decides who is above the median, and so needs more care. It is
trained plainly, and against every sex, every age of the data and small changes of the measurements, by three
relaxations. A person is treated fairly where no such change turns the decision.

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


def alike(x: Tensor, ages: Tensor) -> tuple[Tensor, ox.InputBox]:
    """Each person as either sex, [2 * people, 10], and all who count as the same person: a box for each sex."""
    either = x.repeat(2, 1)
    either[: len(x), SEX], either[len(x) :, SEX] = 0.0, 1.0
    lower, upper = either - SMALL, either + SMALL
    lower[:, SEX] = upper[:, SEX] = either[:, SEX]
    lower[:, AGE], upper[:, AGE] = ages.aminmax()
    return either, ox.InputBox(lower, upper)


def train(relaxation: str | None, x: Tensor, labels: Tensor, ages: Tensor, epochs: int) -> nn.Module:
    """A network of two hidden layers; without a relaxation on the patients alone."""
    net = ox.models.fc(10, 20, 20, 2, seed=0)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3, weight_decay=1e-3)
    kappa = LinearRamp(1.0, 0.2, begin=0.0, length=epochs / 2)  # weight of the natural loss
    for epoch in range(epochs):
        for index in torch.randperm(len(x), generator=order).split(100):
            either, region = alike(x[index], ages)
            weight = 1.0 if relaxation is None else kappa(epoch)
            loss = ox.CertifiedLoss(relaxation or "box", kappa=weight)
            terms = loss(net, region, labels[index].repeat(2), either if relaxation else x[index].repeat(2, 1))
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
        either, region = alike(x[test], ages)
        row: dict[str, object] = {"training": relaxation or "plain"}
        row["accuracy %"] = 100 * float((decisions == labels[test]).double().mean())
        report = ox.certify(net, (either, decisions.repeat(2)), region=region, relaxation=["box", "crown", "triangle"])
        for name in report.relaxations:
            proved = torch.from_numpy((report.examples[f"lower:{name}"] > 0).to_numpy())
            row[f"fair % by {name}"] = 100 * float(proved.reshape(2, -1).all(0).double().mean())
        attacked = torch.from_numpy((report.examples["verdict"] == "attacked").to_numpy())
        row["unfair %, at least"] = 100 * float(attacked.reshape(2, -1).any(0).double().mean())
        table.append(row)
    frame = pl.DataFrame(table)
    print(text_table(frame, decimals=dict.fromkeys(frame.columns[1:], 1)))
    majority = 100 * float(labels[test].bincount().max() / int(test.sum()))
    print(f"{int(test.sum())} people; a decision by majority is right for {majority:.1f} %")


if __name__ == "__main__":
    main()
