"""The engines, and the choice among them.

An engine is a module that answers three questions about a Problem: can I (`obstacle`), at what cost (`seconds`), and
do it (`run`). To add one, write its file and its line in ENGINES.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from core.engines import tensor
from core.errors import MethodUnavailable
from core.shapes import Problem, one_of

Method = Literal["auto", "direct", "fft", "separable"]


class Engine(Protocol):
    """One algorithm."""

    METHOD: str
    """The family it belongs to, as `method` names it."""

    def obstacle(self, problem: Problem, /) -> str | None:
        """Why it cannot solve the problem, or None."""

    def seconds(self, problem: Problem, /) -> float:
        """The predicted time, in seconds."""

    def run(self, problem: Problem, images: Tensor, weight: Tensor, bias: Tensor | None, /) -> Tensor:
        """Images (N, C, H, W), weight (O, C/groups, h, w), bias (O) or None -> (N, O, oh, ow)."""


ENGINES: Mapping[str, Engine] = {
    "tensor": tensor,
}


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine by name, its predicted time in seconds, and what was held against the others."""

    engine: str
    seconds: float
    obstacles: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Result:
    """The output of a convolution and how it was made: engine by name, device as torch names it."""

    output: Tensor
    engine: str
    device: str


def choose(problem: Problem, method: Method = "auto", engines: Mapping[str, Engine] = ENGINES) -> Choice:
    """The engine with the least predicted time among those that can solve the problem by that method.

    Raises MethodUnavailable with every engine's reason where there is none.
    """
    one_of("method", method, Method)
    obstacles: dict[str, str] = {}
    predicted: dict[str, float] = {}
    for name, engine in engines.items():
        reason = f"works by {engine.METHOD}" if method not in ("auto", engine.METHOD) else engine.obstacle(problem)
        if reason is None:
            predicted[name] = engine.seconds(problem)
        else:
            obstacles[name] = reason
    if not predicted:
        reasons = "; ".join(f"{name} {reason}" for name, reason in obstacles.items())
        methods = ", ".join(["auto", *sorted({engine.METHOD for engine in engines.values()})])
        raise MethodUnavailable(
            f'no engine for method "{method}": {reasons}', field="method", got=method, limit=methods
        )
    fastest = min(predicted, key=predicted.__getitem__)
    return Choice(fastest, predicted[fastest], obstacles)


def solve(problem: Problem, images: Tensor, weight: Tensor, bias: Tensor | None, method: Method) -> Result:
    """Run the chosen engine. Shapes as in Engine.run."""
    name = choose(problem, method).engine
    return Result(ENGINES[name].run(problem, images, weight, bias), name, str(images.device))
