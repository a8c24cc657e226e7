"""One configuration of a certification: what it does with a batch of examples."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from optrelax.analysis import Net
from optrelax.certification.answers import Answers
from optrelax.certification.attacks import Attack
from optrelax.certification.estimates import FEW, expected_seconds
from optrelax.certification.journals import tensor_digest, weights_digest
from optrelax.certification.preparation import (
    device_of,
    limited,
    named,
    radius_of,
    range_of,
    require_dtype,
    require_exact_weights,
    require_region,
)
from optrelax.certification.sample_questions import SampleQuestions
from optrelax.certification.verdict_rules import with_verdict
from optrelax.certification.verdicts import Example, Verdict
from optrelax.data.samples import Samples
from optrelax.disjunctions import group_bounds
from optrelax.errors import Problem, UnsupportedOpError, UnsupportedRegionError
from optrelax.frozen import field_values
from optrelax.margin_rows import label_rows
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network
from optrelax.regions import Number, Region, ball_of
from optrelax.relaxations import NamedRelaxations, Relaxation, with_rounding
from optrelax.rounding import Rounding, check_rounding
from optrelax.specifications import Specification
from optrelax.training.recording import record

if TYPE_CHECKING:
    from optrelax.layers.milp import Milp

__all__ = ["Certifier"]

# What a bound, an attack or a solver can raise for one example and not for another; a typing slip in the library
# is among them on purpose: it must spoil its own example only, and it is reported there.
_FAILURES = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

_Question = tuple[Region, Tensor, Tensor]  # region of one example, its rows, each row's best bound


@dataclass(frozen=True, kw_only=True)
class Certifier(SampleQuestions):
    """One configuration over one data set; batches are positions in the samples."""

    relaxations: Mapping[str, Relaxation]
    """By the name that the user gave."""
    attack: Attack | None = None
    exact: Milp | None = None
    cascade: bool = False
    """Whether a relaxation is asked only what those before it left open."""

    @classmethod
    def prepared(
        cls,
        net: Net,
        samples: Samples,
        eps: Number | None,
        clip: tuple[Number, Number] | None,
        relaxation: NamedRelaxations,
        rounding: Rounding,
        dtype: torch.dtype,
        max_bytes: int | None,
        owner: str = "certify",
        norm: str = "linf",
        *,
        region: Region | None = None,
        spec: Specification | None = None,
    ) -> Certifier:
        """Check everything that does not depend on an example; errors begin with the name of the `owner`."""
        check_rounding(owner, rounding)
        require_dtype(owner, dtype)
        eps = radius_of(owner, eps, region)
        if region is not None:
            clip = None
            require_region(region, samples, owner)
        legal = range_of(owner, clip)
        ball_of(norm)
        relaxations = named(relaxation, owner)
        network = capture(net, tuple(samples.x.shape[1:]))
        network.require_eval()
        require_exact_weights(network, dtype, owner)
        spec = _fitting(owner, spec, network, samples)
        samples.require_range(legal, owner)
        limit = max_bytes or (2**25 if device_of(network).type == "cpu" else 2**30)
        return cls(
            network=network,
            samples=samples,
            eps=eps,
            clip=legal,
            norm=norm,
            # The default is the size at which rows are pulled back fastest; LPs in lots that small are slow.
            relaxations={
                name: limited(with_rounding(r, rounding), limit, every=max_bytes is not None)
                for name, r in relaxations.items()
            },
            rounding=rounding,
            dtype=dtype,
            region=region,
            spec=spec,
        )

    def settings(self) -> dict[str, object]:
        """What the report and the journal say about the run, JSON-ready."""
        return {
            "eps": self.eps,
            "clip": None if self.clip is None else list(self.clip),
            "norm": self.norm,
            "relaxations": list(self.relaxations),
            "cascade": self.cascade,
            "dtype": str(self.dtype).removeprefix("torch."),
            "rounding": self.rounding,
            "attack": record(self.attack),
            "exact": record(self.exact),
            **self._asked(),
        }

    def _asked(self) -> dict[str, object]:
        """What is asked in place of margins in a ball, in words."""
        found: dict[str, object] = {}
        if self.region is not None:
            found["region"] = type(self.region).__name__
        if self.spec is not None:
            found["specification"] = list(self.spec.labels)
        return found

    def fingerprint(self) -> dict[str, object]:
        """What must be equal for examples to be taken over from another run."""
        # Memory limits change no result; everything else in a relaxation may.
        plain = [repr(limited(r, None, force=True)) for r in self.relaxations.values()]
        data = [self.samples.x, self.samples.labels, self.samples.index]
        if self.region is not None:
            parts = field_values(self.region).values()
            data += [
                part if isinstance(part, Tensor) else torch.tensor(list(repr(part).encode()), device="cpu")
                for part in parts
            ]
        if self.spec is not None:
            groups = torch.tensor([[i, row] for i, group in enumerate(self.spec.groups) for row in group], device="cpu")
            data += [self.spec.rows, self.spec.offsets, self.spec.closed, groups]
        return {
            **self.settings(),
            "relaxations": plain,
            "weights": weights_digest(self.network),
            "data": tensor_digest(*data),
        }

    def isolated(self, positions: Tensor, known: frozenset[int] = frozenset()) -> Iterator[Example]:
        """The examples of a batch; one that raises is found by halving the batch, so that it spoils only itself.

        known: examples by index that are computed with the others, and not given.
        """
        try:
            judged = self._batch(positions)
        except (UnsupportedOpError, UnsupportedRegionError):
            raise
        except _FAILURES as error:
            self._require_working(error)
            if len(positions) == 1:
                failed = self._failed(int(positions), error)
                if failed.index not in known:
                    yield failed
                return
            half = len(positions) // 2
            yield from self.isolated(positions[:half], known)
            yield from self.isolated(positions[half:], known)
        else:
            for position, (example, question) in zip(positions.tolist(), judged, strict=True):
                if example.index in known:
                    continue
                if question is None:
                    yield example
                    continue
                try:
                    yield self._decided(example, *question)
                except _FAILURES as error:
                    yield self._failed(position, error)

    def expected_seconds(self, positions: Tensor, size: int) -> float | None:
        """Seconds that these take, were each asked everything but MILP; None of few, and where one fails."""
        if len(positions) <= FEW:
            return None
        try:
            return expected_seconds(replace(self, cascade=False).numbers, positions, size)
        except _FAILURES:
            return None

    def _require_working(self, error: BaseException) -> None:
        """Raise `error` if a ball of no width fails in the same way: then the settings are at fault, not an example."""
        x = self.samples.x.new_zeros(1, *self.network.input_shape, dtype=self.dtype, device=device_of(self.network))
        spec = self.specification(torch.zeros(1, dtype=torch.int64, device="cpu")).to(x.device, x.dtype)
        for relaxation in self.relaxations.values():
            try:
                group_bounds(relaxation, self.network, ball_of(self.norm)(x, 0.0), spec, sign=True)
            except _FAILURES as again:
                if type(again) is type(error):
                    raise error from again

    def _failed(self, position: int, error: BaseException) -> Example:
        index, label = int(self.samples.index[position]), self.label(position)
        message = f"{type(error).__name__}: {error}"
        return Example(index=index, label=label, verdict=Verdict.ERROR, message=message)

    def _require_agreement(self, x: Tensor) -> None:
        """UnsupportedOpError where the module itself gives other outputs on the data than its graph."""
        if reason := self.network.disagreement(x):
            problem = Problem("(root)", type(self.network.module).__name__, reason)
            raise UnsupportedOpError([problem])

    def numbers(self, positions: Tensor) -> tuple[Tensor, Answers]:
        """Outputs of a batch at its inputs, and what the attack and the relaxations say."""
        x, ball, spec = self.question(positions)
        self._require_agreement(x)
        logits = self.network(x).reshape(len(x), -1)
        return logits, Answers(self, positions, ball, spec, spec.worst(spec.values(logits)).amin(1)).ask()

    def _batch(self, positions: Tensor) -> list[tuple[Example, _Question | None]]:
        """Input, attack, bounds, verdicts, and what is left for the MILP solver to settle."""
        begin = time.perf_counter()
        logits, answers = self.numbers(positions)
        seconds = (time.perf_counter() - begin) / len(positions)
        judged: list[tuple[Example, _Question | None]] = []
        for i, position in enumerate(positions.tolist()):
            example = Example(
                index=int(self.samples.index[position]),
                label=self.label(position),
                prediction=self.prediction(logits[i]),
                verdict=Verdict.UNDECIDED,
                natural_margin=float(answers.natural[i]),
                seconds=seconds,
                **answers.of(i),
            )
            example = with_verdict(self, example)
            question = None
            if example.verdict == Verdict.UNDECIDED and self.exact is not None:
                best = torch.stack([bound[i] for bound in answers.lower]).amax(0)
                rows = answers.spec.rows.expand(len(positions), -1, -1)[i : i + 1]
                question = answers.ball.select(slice(i, i + 1)), rows, best
            judged.append((example, question))
        return judged

    def _decided(self, example: Example, ball: Region, rows: Tensor, lower: Tensor) -> Example:
        """What the MILP solver says about one undecided example; lower [k]: each margin's best sound bound."""
        assert self.exact is not None
        begin = time.perf_counter()
        order = [row for row in lower.argsort().tolist() if not lower[row] > 0]
        shaped = rows.reshape(*rows.shape[:2], *self.network.output_shape)
        answer = self.exact.decide(self.network, ball, shaped, order)
        worst = float(torch.maximum(answer.lower, lower.cpu()).amin())
        verdict = example.verdict
        if float(answer.upper.amin()) <= 0:
            verdict = Verdict.ATTACKED
        elif worst > 0:
            verdict = Verdict.CERTIFIED_MILP
        return replace(
            example,
            verdict=verdict,
            milp_lower=worst,
            seconds=example.seconds + time.perf_counter() - begin,
            message=answer.message,
        )


def _fitting(owner: str, spec: Specification | None, network: Network, samples: Samples) -> Specification | None:
    """What is asked in place of the labels' margins; ValueError where it, or a label, does not fit the network."""
    if spec is not None:
        spec = spec.flat().to(dtype=torch.float64)
        spec.require_fit(owner, network.outputs, torch.Size([len(samples)]))
    elif not samples.labelled:
        raise ValueError(f"{owner}: inputs alone want a spec; margins want a pair (x, labels)")
    else:
        label_rows(samples.labels, network.output_shape, owner)  # raises for labels out of range
    return spec
