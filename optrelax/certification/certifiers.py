"""One configuration of a certification: what it does with a batch of examples."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from optrelax.analysis import Net
from optrelax.certification.attacks import Attack
from optrelax.certification.journals import tensor_digest, weights_digest
from optrelax.certification.verdicts import Example, Verdict
from optrelax.data.samples import Samples
from optrelax.disjunctions import group_bounds
from optrelax.errors import Problem, UnsupportedOpError
from optrelax.networks.capturing import capture
from optrelax.networks.graph import Network
from optrelax.regions import Number, Region, as_number, ball_of
from optrelax.relaxations import Intersect, Relaxation, name_of, named_relaxations, with_rounding
from optrelax.rounding import Rounding, check_rounding
from optrelax.specifications import Specification, label_rows
from optrelax.training.runs import record

if TYPE_CHECKING:
    from optrelax.layers.milp import Milp

__all__ = ["Certifier", "default_batch_size", "device_of", "named"]

# What a bound, an attack or a solver can raise for one example and not for another; a typing slip in the library
# is among them on purpose: it must spoil its own example only, and it is reported there.
_FAILURES = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

_Question = tuple[Region, Tensor, Tensor]  # region of one example, its rows, each row's best bound


@dataclass(frozen=True, kw_only=True)
class Certifier:
    """One configuration over one data set; batches are positions in the samples."""

    network: Network
    samples: Samples
    eps: float | None
    """None where a region was given."""
    clip: tuple[float, float] | None
    norm: str
    relaxations: Mapping[str, Any]
    """By the name that the user gave."""
    rounding: Rounding
    dtype: torch.dtype
    region: Region | None = None
    """One of every sample, in place of the ball of eps."""
    spec: Specification | None = None
    """In place of the margins of the labels; of every sample, or shared."""
    attack: Attack | None = None
    exact: Milp | None = None

    @classmethod
    def prepared(
        cls,
        net: Net,
        samples: Samples,
        eps: Number | None,
        clip: tuple[Number, Number] | None,
        relaxation: Any,
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
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{owner}: dtype must be torch.float32 or torch.float64, got {dtype}")
        if (eps is None) == (region is None):
            raise ValueError(f"{owner}: give eps, or a region of every input, and not both")
        if eps is not None:
            eps = as_number(owner, "eps", eps)
            if not 0 <= eps < math.inf:
                raise ValueError(f"{owner}: eps must be a finite number >= 0, got {eps!r}")
        if region is not None:
            clip = None
            _require_region(region, samples, owner)
        if clip is not None:
            clip = as_number(owner, "clip's low end", clip[0]), as_number(owner, "clip's high end", clip[1])
        ball_of(norm)
        relaxations = named(relaxation, owner)
        network = capture(net, tuple(samples.x.shape[1:]))
        network.require_eval()
        _require_exact_weights(network, dtype, owner)
        if spec is not None:
            spec = spec.flat().to(dtype=torch.float64)
            spec.require_fit(owner, network.outputs, torch.Size([len(samples)]))
        elif not samples.labelled:
            raise ValueError(f"{owner}: inputs alone want a spec; margins want a pair (x, labels)")
        else:
            label_rows(samples.labels, network.output_shape, owner)  # raises for labels out of range
        samples.require_range(clip, owner)
        limit = max_bytes or (2**25 if device_of(network).type == "cpu" else 2**30)
        every = max_bytes is not None
        return cls(
            network=network,
            samples=samples,
            eps=None if eps is None else float(eps),
            clip=None if clip is None else (float(clip[0]), float(clip[1])),
            norm=norm,
            # The default is the size at which rows are pulled back fastest; LPs in lots that small are slow.
            relaxations={
                name: _limited(r, limit) if every or not r.solves else r
                for name, r in ((name, with_rounding(r, rounding)) for name, r in relaxations.items())
            },
            rounding=rounding,
            dtype=dtype,
            region=region,
            spec=spec,
        )

    def ball(self, x: Tensor, eps: float | Tensor | None = None) -> Region:
        """The region around inputs; eps: another radius than the run's."""
        return ball_of(self.norm)(x, self.eps if eps is None else eps, self.clip)

    def settings(self) -> dict[str, Any]:
        """What the report and the journal say about the run, JSON-ready."""
        return {
            "eps": self.eps,
            "clip": None if self.clip is None else list(self.clip),
            "norm": self.norm,
            "relaxations": list(self.relaxations),
            "dtype": str(self.dtype).removeprefix("torch."),
            "rounding": self.rounding,
            "attack": record(self.attack),
            "exact": record(self.exact),
            **self._asked(),
        }

    def _asked(self) -> dict[str, Any]:
        """What is asked in place of margins in a ball, in words."""
        found: dict[str, Any] = {}
        if self.region is not None:
            found["region"] = type(self.region).__name__
        if self.spec is not None:
            found["specification"] = list(self.spec.labels)
        return found

    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for examples to be taken over from another run."""
        # Memory limits change no result; everything else in a relaxation may.
        plain = [repr(_limited(r, None, force=True)) for r in self.relaxations.values()]
        data = [self.samples.x, self.samples.labels, self.samples.index]
        if self.region is not None:
            parts = [getattr(self.region, f.name) for f in fields(self.region)]  # type: ignore[arg-type]
            data += [part if isinstance(part, Tensor) else torch.tensor(list(repr(part).encode())) for part in parts]
        if self.spec is not None:
            groups = torch.tensor([[i, row] for i, group in enumerate(self.spec.groups) for row in group])
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
        except UnsupportedOpError:
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

    def _require_working(self, error: BaseException) -> None:
        """Raise `error` if a ball of no width fails in the same way: then the settings are at fault, not an example."""
        x = self.samples.x.new_zeros(1, *self.network.input_shape, dtype=self.dtype, device=device_of(self.network))
        spec = self._specification(torch.zeros(1, dtype=torch.int64)).to(x.device, x.dtype)
        for relaxation in self.relaxations.values():
            try:
                group_bounds(relaxation, self.network, ball_of(self.norm)(x, 0.0), spec, sign=True)
            except _FAILURES as again:
                if type(again) is type(error):
                    raise error from again

    def _failed(self, position: int, error: BaseException) -> Example:
        index, label = int(self.samples.index[position]), self._label(position)
        message = f"{type(error).__name__}: {error}"
        return Example(index=index, label=label, verdict=Verdict.ERROR, message=message)

    def _label(self, position: int) -> int | None:
        return int(self.samples.labels[position]) if self.samples.labelled else None

    def _specification(self, positions: Tensor) -> Specification:
        """What is asked of some samples, on the network's device."""
        if self.spec is not None:
            return self.spec.select(positions.to(self.spec.rows.device)).to(device_of(self.network))
        rows = label_rows(self.samples.labels[positions], self.network.output_shape, "certify")
        return Specification(rows.to(device_of(self.network), torch.float64))

    def question(self, positions: Tensor) -> tuple[Tensor, Region, Specification]:
        """Inputs of a batch, their regions and what is asked there, in float64."""
        x = self.samples.x[positions.to(self.samples.x.device)].to(device_of(self.network), torch.float64)
        if self.region is None:
            assert self.eps is not None
            return x, self.ball(x), self._specification(positions)
        part = self.region.select(positions.to(self.region.device))
        return x, part.to(torch.float64, x.device), self._specification(positions)

    def _prediction(self, logits: Tensor) -> int | None:
        """The class of the greatest score; with one output, by its sign, in the labels' own numbers."""
        if not self.samples.labelled or bool(logits.isnan().any()):
            return None
        if len(logits) > 1:
            return int(logits.argmax())
        negative = -1 if bool((self.samples.labels < 0).any()) else 0
        return 1 if float(logits) > 0 else negative

    def _require_agreement(self, x: Tensor) -> None:
        """UnsupportedOpError where the module itself gives other outputs on the data than its graph."""
        if reason := self.network.disagreement(x):
            problem = Problem("(root)", type(self.network.module).__name__, reason)
            raise UnsupportedOpError([problem])

    def _batch(self, positions: Tensor) -> list[tuple[Example, _Question | None]]:
        """Input, attack, bounds, verdicts, and what is left for the MILP solver to settle."""
        begin = time.perf_counter()
        x, ball, spec = self.question(positions)
        self._require_agreement(x)
        logits = self.network(x).reshape(len(x), -1)
        natural = spec.worst(spec.values(logits)).amin(1)
        attacked = self._attacked(ball, spec, natural, positions) if self.attack is not None else None
        lower, spent = self._bounds(ball, spec)
        seconds = (time.perf_counter() - begin) / len(positions)
        judged: list[tuple[Example, _Question | None]] = []
        for i, position in enumerate(positions.tolist()):
            example = Example(
                index=int(self.samples.index[position]),
                label=self._label(position),
                prediction=self._prediction(logits[i]),
                verdict=Verdict.UNDECIDED,
                natural_margin=float(natural[i]),
                attack_margin=None if attacked is None else float(attacked[i]),
                lower=tuple(float(bound[i].amin()) for bound in lower),
                rows=tuple(tuple(bound[i].tolist()) for bound in lower) if spec.names else (),
                bound_seconds=tuple(spent),
                seconds=seconds,
            )
            example = self._judged(example)
            question = None
            if example.verdict == Verdict.UNDECIDED and self.exact is not None:
                best = torch.stack([bound[i] for bound in lower]).amax(0)
                question = ball.select(slice(i, i + 1)), spec.rows.expand(len(x), -1, -1)[i : i + 1], best
            judged.append((example, question))
        return judged

    def _attacked(self, ball: Region, spec: Specification, natural: Tensor, positions: Tensor) -> Tensor:
        """Smallest margin found, the input's among them, replayed in float64 at points of the region: [batch]."""
        assert self.attack is not None
        keys = self.samples.index[positions].tolist()
        found = self.attack.search(self.network, ball.to(self.dtype), spec.to(dtype=self.dtype), keys)
        points = ball.project(found.points.double())
        if not bool(ball.contains(points).all()):
            raise RuntimeError("the attack left the region")
        replayed = spec.worst(spec.values(self.network(points).reshape(len(points), -1))).amin(1)
        return torch.minimum(natural, replayed)  # a NaN stays one

    def _bounds(self, ball: Region, spec: Specification) -> tuple[list[Tensor], list[float]]:
        """Lower bounds [batch, groups] of each relaxation and its seconds an example."""
        region, spec = self.rounded(ball), spec.to(dtype=self.dtype)
        lower, spent = [], []
        for relaxation in self.relaxations.values():
            begin = time.perf_counter()
            bound = group_bounds(relaxation, self.network, region, spec, sign=True)
            if bound.is_cuda:
                torch.cuda.synchronize(bound.device)
            spent.append((time.perf_counter() - begin) / max(1, len(bound)))
            lower.append(bound.detach().double())
        return lower, spent

    def rounded(self, ball: Region) -> Region:
        """The region in `dtype`, with outward rounding wide enough for the rounding of its own ends."""
        return ball.outward().enclosing(self.dtype) if self.rounding == "outward" else ball.to(self.dtype)

    def _judged(self, example: Example) -> Example:
        """The verdict that input, attack and bounds allow."""
        verdict, message = self._verdict(example)
        if message.startswith("contradiction"):
            warnings.warn(
                f"certify: example {example.index}: {message}; this is a fault of a relaxation, please report it",
                RuntimeWarning,
                stacklevel=2,
            )
        return replace(example, verdict=verdict, message=message)

    def _verdict(self, example: Example) -> tuple[Verdict, str]:
        """What an example's numbers come to, and why where that is an error."""
        lower = [bound for bound in example.lower if bound is not None]
        assert example.natural_margin is not None
        if math.isnan(example.natural_margin):
            return Verdict.ERROR, "the network gives NaN at the input"
        if example.attack_margin is not None and math.isnan(example.attack_margin):
            return Verdict.ERROR, "the network gives NaN within the region"
        wrong = [name for name, b in zip(self.relaxations, lower, strict=True) if math.isnan(b) or b == math.inf]
        if wrong:
            message = f"the bound of {', '.join(wrong)} is not a number; the network may overflow on this region"
            return Verdict.ERROR, message
        worst = example.natural_margin
        if example.attack_margin is not None:
            worst = min(worst, example.attack_margin)
        proofs = [f"{name} ({b:.9g})" for name, b in zip(self.relaxations, lower, strict=True) if b > 0]
        if worst <= 0 and proofs:
            message = (
                f"contradiction: certified by {', '.join(proofs)}, but a point of the region has margin {worst:.9g}"
            )
            return Verdict.ERROR, message
        if worst <= 0:
            return Verdict.ATTACKED, ""
        return (Verdict.CERTIFIED if proofs else Verdict.UNDECIDED), ""

    def confirm(self, example: Example) -> None:
        """ValueError where an example that a journal holds contradicts itself, its data set or these settings."""
        if reason := self._contradiction(example):
            raise ValueError(
                f"example {example.index} is {str(example.verdict)!r} there, but {reason}; remove its line, and it is "
                "certified again"
            )

    def _contradiction(self, example: Example) -> str:
        """What speaks against an example's verdict, "" where nothing does."""
        places = (self.samples.index == example.index).nonzero().flatten().tolist()
        if not places:
            return "it is no example of this run"
        label = self._label(places[0])
        if example.label != label:
            return f"its label is {example.label} there and {label} in the data"
        if len(example.lower) != len(self.relaxations) or None in (example.natural_margin, *example.lower):
            return f"it lacks bounds of {len(self.relaxations)} relaxations and a margin"
        if (example.attack_margin is None) != (self.attack is None):
            return "it was attacked and this run attacks none, or the other way round"
        assert example.natural_margin is not None
        if example.attack_margin is not None and example.attack_margin > example.natural_margin:
            return "its attack found less than its input"
        right = example.prediction == label
        if self.spec is None and ((example.natural_margin > 0 and not right) or (example.natural_margin < 0 and right)):
            return f"its prediction is {example.prediction} at a margin of {example.natural_margin:.9g}"
        allowed = self._verdict(example)[0]
        if allowed == Verdict.UNDECIDED and self.exact is not None:
            if example.milp_lower is None:
                return "it was not given to the MILP solver"
            # Its upper bound, which may attack, is not kept; a lower bound above 0 proves.
            proved = example.milp_lower > 0
            wanted = (Verdict.CERTIFIED_MILP,) if proved else (Verdict.UNDECIDED, Verdict.ATTACKED)
        else:
            wanted = (allowed,)
        if example.verdict not in wanted:
            return f"its own bounds and margins make it {' or '.join(map(repr, map(str, wanted)))}"
        return ""

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


def named(relaxation: Any, owner: str) -> dict[str, Relaxation]:
    """Relaxations by name, in a mapping by the user's own; ValueError for none, one twice, or an unsound one."""
    found = named_relaxations(owner, relaxation, lambda one: name_of(with_rounding(one, "nearest")))
    for name, one in found.items():
        if not one.sound:
            raise ValueError(f"{owner}: {name} is an estimate, not a bound, and certifies nothing; choose another")
    return found


def _require_region(region: Any, samples: Samples, owner: str) -> None:
    if not isinstance(region, Region):
        raise TypeError(f"{owner}: region wants an InputBox, LinfBall or another Region, got {type(region).__name__}")
    if region.shape != samples.x.shape:
        raise ValueError(f"{owner}: region is of inputs {tuple(region.shape)}, the inputs are {tuple(samples.x.shape)}")
    x = samples.x.double().to(region.device)
    inside = region.to(torch.float64).contains(x) | ~x.isfinite().flatten(1).all(1)
    if not bool(inside.all()):
        raise ValueError(f"{owner}: input {int((~inside).nonzero()[0])} lies outside its region")


def _require_exact_weights(network: Network, dtype: torch.dtype, owner: str) -> None:
    """ValueError where `dtype` would round the weights: the bounds would be those of another network."""
    for name, value in network.module.state_dict().items():
        if isinstance(value, Tensor) and value.dtype == torch.float64 and dtype != torch.float64:
            raise ValueError(f"{owner}: {name} is float64, which dtype={dtype} would round; use torch.float64")


def _limited(relaxation: Any, max_bytes: float | None, force: bool = False) -> Any:
    """The relaxation with a memory limit where it has none of its own (`force`: in place of its own)."""
    if isinstance(relaxation, Intersect):
        parts = [_limited(part, max_bytes, force) for part in relaxation.parts]
        own = max_bytes if force else relaxation.max_bytes
        return Intersect(*parts, rounding=relaxation.rounding, max_bytes=own)
    if not any(f.name == "max_bytes" for f in fields(relaxation)):
        return relaxation
    if not force and relaxation.max_bytes is not None:
        return relaxation
    return replace(relaxation, max_bytes=max_bytes)


def device_of(network: Network) -> torch.device:
    """Where the network's parameters live."""
    parameter = next(network.module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def default_batch_size(network: Network) -> int:
    """Examples whose values, bounds, lines and margins' rows take some 128 MiB; at most 100 (1000 on a GPU)."""
    values = sum(math.prod(network.shape_of(name)) for name in (network.input, *(node.name for node in network)))
    most = 1000 if device_of(network).type == "cuda" else 100
    rows = network.outputs * (network.outputs - 1)
    return max(1, min(most, 2**27 // (8 * (16 * values + 2 * rows))))
