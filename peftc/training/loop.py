"""The only training loop: optimizer, schedule, clipping, accumulation; devices and processes are Accelerate's.

Everything random of a step is drawn from the seed and the number of the step, and the samples of a step follow from the
seed and its epoch. So a run that was killed goes on from its last checkpoint to the same bytes, and a step learns from
the same samples however many processes and parts share it.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from peftc import processes, progress
from peftc.data.augment import Seeds
from peftc.errors import DivergenceError, PeftcError
from peftc.measure.costs import out_of_memory
from peftc.models import sharding
from peftc.nn import surgery
from peftc.options import Recipe
from peftc.training import parallel
from peftc.training.accelerator import accelerator_of
from peftc.training.arrival import Arrivals, Marked, Stream, shortly
from peftc.training.interruption import Interruption, interruption
from peftc.training.journal import Journal
from peftc.training.optimizers import optimizer_of
from peftc.training.parallel import Step, Terms
from peftc.training.pieces import Like
from peftc.training.schedule import Outcome, mixed, rate

SAVE_EVERY = 60.0  # seconds between checkpoints
RESERVED = 0.85  # share of the minutes for forward and backward; the rest is for the optimizer and for looking
TIMED_STEPS = 5  # that say how many fit in the minutes asked for
MANY_STEPS = 1 << 20  # more than are timed: samples are read ahead as if there were no end


def fit(
    module: nn.Module,
    size: int | Marked,
    batch: Callable[[Sequence[int], Seeds], Any],
    loss: Callable[[nn.Module, Any], Tensor | Terms],
    recipe: Recipe,
    *,
    workers: int | None = None,
    tokens: Callable[[Any], int] | None = None,
    device: str = "auto",
    score: Callable[[], float] | None = None,
    folder: Path | None = None,
    log_with: str | None = None,
    log_folder: Path | None = None,
    after_step: Callable[[int, int], None] | None = None,
    keep_last: bool = False,
) -> Outcome:
    """Train ``module`` in place and leave it in eval mode; the caller's random state is left as it was.

    Args:
        module: what learns; parameters with two or more axes decay.
        size: number of samples, or what they are where there is no end of them: ``index`` then is a place.
        batch: gives the collated batch of some samples, by seeds where it is random; on the CPU where others read it.
        loss: maps the module and a batch to a scalar, or to weighted terms, each a mean over the samples.
        recipe: how.
        workers: processes that read batches ahead; as many as pay when None.
        tokens: counts those of a batch, where there are any.
        device: where.
        score: how good the module is on held-out samples; the best weights seen are kept. The last ones without it.
        folder: for checkpoints, from which the same call goes on, and the log; nothing is kept when None.
        log_with: a tracker that Accelerate knows, as ``tensorboard``, which writes into ``log_folder``.
        log_folder: of the tracker.
        keep_last: keep the last weights, whatever the scores say.
        after_step: called with the number of steps made and to make, after each, while its gradients are still there.

    Raises:
        DivergenceError: the loss is NaN or infinite.
        PeftcError: a process of the launch is gone, or there is too little memory.
    """
    accelerator = accelerator_of(recipe, device, log_with, log_folder)
    if sharding.is_cut(module):
        sharding.rest(module)
    else:
        module.to(accelerator.device)
    rates = {"learning_rate": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    optimizer = accelerator.prepare(optimizer_of(recipe.optimizer, module, **rates, place=accelerator.device))
    journal = Journal(folder)
    stream = Stream(size, recipe, batch, workers, tokens)
    run = _Run(accelerator, module, optimizer, stream, Step(module, loss), recipe, journal, after_step, keep_last)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with processes.watched(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(recipe.seed)
        run.total = run.resolve()
        run.restore()
        run.share()
        run.go(score, log_with)
        run.end(score is not None)
    if log_with:
        accelerator.end_training()
    module.eval()
    return run.outcome


@dataclass
class _Run:
    """The state of a training between two steps, and what moves it on."""

    accelerator: Accelerator
    module: nn.Module
    optimizer: Any
    stream: Stream
    learner: nn.Module  # a `Step`, which Accelerate then prepares
    recipe: Recipe
    journal: Journal
    after_step: Callable[[int, int], None] | None
    keep_last: bool
    total: int = 0
    step: int = 0
    arrivals: Arrivals = field(init=False)  # those of the steps to come
    stop: Interruption = field(init=False)
    saved: float = field(default_factory=time.monotonic)  # when that last was
    saving: bool = False  # whether any process finds it is time to
    outcome: Outcome = field(default_factory=Outcome)
    average: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.recipe.ema is not None:
            self.average = {name: tensor.detach().clone() for name, tensor in self.learning().items()}

    def learning(self) -> dict[str, nn.Parameter]:
        """Return the parameters that learn, by name."""
        return {name: each for name, each in self.module.named_parameters() if each.requires_grad}

    def changing(self) -> dict[str, Tensor]:
        """Return the tensors that a step may change, by name: parameters that learn, and buffers."""
        frozen = {name for name, each in self.module.named_parameters() if not each.requires_grad}
        return {name: each for name, each in surgery.tensors_of(self.module).items() if name not in frozen}

    def share(self) -> None:
        """Let all processes learn together from now on."""
        part = self.step * self.recipe.accumulate
        with self.in_memory():
            self.learner = parallel.spread(self.accelerator, self.learner, lambda: self.stream.given(part))

    def rate(self) -> float:
        """Return the learning rate of the step to come."""
        return rate(self.step, self.total, self.recipe)

    def moments(self) -> set[int]:
        """Return the steps before which, and the last after which, the held-out samples are looked at."""
        looks = self.recipe.evaluations
        return {0} | {math.ceil(self.total * look / looks) for look in range(1, looks + 1)}

    def go(self, score: Callable[[], float] | None, log_with: str | None) -> None:
        """Make the steps that are left, and look at the held-out samples in between."""
        begun, first = time.monotonic(), self.step
        with (
            progress.track(f"training on {self.stream}", self.total) as advance,
            self.stream.arriving(first, self.total) as self.arrivals,
            interruption(self.save) as self.stop,
        ):
            for _ in range(first):
                advance("")
            while not self.is_over(score):
                start = time.monotonic()
                terms = self.learn()
                self.arrivals.add(time.monotonic() - start)
                self.tell(terms, log_with)
                advance(f"loss {self.outcome.losses[-1]:.4g}, {shortly(self.arrivals.speed())}")
                if self.saving:
                    self.save()
                if self.stop.due:
                    self.stop.end()
        self.outcome.speed = self.arrivals.speed()
        self.outcome.seconds_per_step = (time.monotonic() - begun) / max(1, self.step - first)

    def is_over(self, score: Callable[[], float] | None) -> bool:
        """Look at the held-out samples where it is time to, and return whether no step is left to make."""
        if score is not None and self.step in self.moments():
            self.judge(score)
        return self.step == self.total or self.idle()

    def learn(self) -> dict[str, float]:
        """Make one step on this process's share of the samples; return the terms, averaged over all."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        values = self.gradients()
        self.outcome.losses.append(self.finite(sum(values.values())))
        if self.step == 0:
            self.outcome.start = values
        if self.recipe.clip:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.clip)
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step(self.step + 1, self.total)
        self.optimizer.zero_grad()
        with torch.no_grad():
            for name, parameter in self.learning().items() if self.average else ():
                self.average[name].lerp_(parameter, 1 - float(self.recipe.ema or 0))
        self.step += 1
        return values

    def gradients(self) -> dict[str, float]:
        """Add up the gradients of the parts of this process's share; return the terms, averaged over parts and all.

        With the terms travels what one process wishes and all do at the same step: an end, and a checkpoint.
        """
        parts = self.recipe.accumulate
        torch.manual_seed(mixed(self.recipe.seed, self.step, 1 + processes.rank()))
        sums: dict[str, Tensor] = {}
        for part in range(parts):
            given = self.arrivals.take()
            with self.in_memory(), parallel.alone(self.learner, part + 1 < parts):
                terms = self.learner(given)
                self.accelerator.backward(parallel.total(terms) / parts)
            for name, each in terms.items():
                sums[name] = sums.get(name, 0) + each.detach().float() / parts
        late = time.monotonic() - self.saved > SAVE_EVERY
        told = [*sums.values(), *(torch.tensor(float(wish)) for wish in (self.stop.asked, late))]
        values = torch.stack([each.to(self.accelerator.device) for each in told])
        if processes.size() > 1:
            values = self.accelerator.reduce(values, "mean")
        *found, asked, late = values.tolist()
        self.stop.agreed, self.saving = asked > 0, late > 0
        return dict(zip(sums, found, strict=True))

    def finite(self, value: float) -> float:
        """Return the loss of a step, or stop there."""
        if math.isfinite(value):
            return value
        samples = [index for _, index in self.stream.step(self.step)]
        kept = f"; the last checkpoint is `{self.journal.last}`" if self.journal.last else ""
        raise DivergenceError(
            f"the loss became {value} at step {self.step + 1}",
            why=f"the samples of that step are {', '.join(map(str, samples[:8]))}{' ...' if len(samples) > 8 else ''}"
            + kept,
            hint="lower `--learning-rate` and add `--overwrite`, or look at those samples",
        )

    @contextmanager
    def in_memory(self) -> Iterator[None]:
        """Refuse a step for which there is too little memory."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, MemoryError) or out_of_memory(error):
                raise self.too_large() from error
            raise

    def too_large(self) -> PeftcError:
        """Return the refusal of a step for whose samples there is too little memory, with what to lower."""
        parts = self.recipe.accumulate
        at_once = self.recipe.batch_size // processes.size() // parts
        hint = "use a smaller model, or another device"
        if at_once > 1:
            hint = f"`--accumulate {2 * parts}` computes the same step in parts of half the size"
        return PeftcError(
            f"out of memory at step {self.step + 1}",
            why=f"{at_once} samples at once do not fit with the gradients and the optimizer's state",
            hint=hint,
        )

    def resolve(self) -> int:
        """Return the number of steps; of minutes, by timing some that are undone."""
        recipe = self.recipe
        if recipe.steps is not None:
            return recipe.steps
        if recipe.epochs is not None:
            assert isinstance(self.stream.size, int)
            return max(1, round(recipe.epochs * self.stream.size / recipe.batch_size))
        return self.journal.steps(self.timed)  # by all processes at once, as they will work

    def timed(self) -> int:
        """Time steps on copies of what they change, and return how many fit in the minutes."""
        seconds = []
        with self.stream.arriving(0, MANY_STEPS) as arrivals:
            for _ in range(TIMED_STEPS + 1):
                start = time.monotonic()
                with torch.random.fork_rng(devices=[]):
                    for _ in range(self.recipe.accumulate):
                        parallel.total(self.learner(arrivals.take())).backward()
                self.module.zero_grad()
                seconds.append(time.monotonic() - start)
        return max(1, int(RESERVED * float(self.recipe.minutes or 0) * 60 / statistics.median(seconds[1:])))

    @property
    def judged(self) -> bool:
        """Whether the weights after this step were looked at."""
        return [step for step, _ in self.outcome.scores[-1:]] == [self.step]

    def judge(self, score: Callable[[], float]) -> None:
        """Score the weights, or their average, and keep them where they are the best so far."""
        if self.judged:
            return  # a resumed run has it
        random = torch.get_rng_state()
        self.module.eval()
        with self.averaged():
            with self.stop.resting():
                value = parallel.agreed(score, self.module)
            better = self.keep_last or value >= max((each for _, each in self.outcome.scores), default=value)
            self.outcome.scores.append((self.step, value))
            if better:
                self.outcome.best = self.step
                self.best = {name: each.detach().clone() for name, each in self.changing().items()}
        self.train()
        torch.set_rng_state(random)
        self.journal.write({"step": self.step, "score": value})

    def idle(self) -> bool:
        """Return whether as many looks in a row brought nothing better as are waited for."""
        patience = self.recipe.early_stop
        if patience is None or not self.judged:
            return False
        scores = [value for _, value in self.outcome.scores]
        return len(scores) > patience and max(scores[-patience:]) <= max(scores[:-patience])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving average in the place of the weights for a while."""
        parameters = self.learning()
        held = {name: parameters[name].detach().clone() for name in self.average}
        _copy(self.average, parameters)
        try:
            yield
        finally:
            _copy(held, parameters)

    def tell(self, terms: Mapping[str, float], log_with: str | None) -> None:
        """Write a line of the log."""
        line = {"step": self.step, "loss": self.outcome.losses[-1], **terms, "rate": self.rate()}
        self.journal.write(line)
        if log_with:  # how fast it was, no other run would repeat: the journal says nothing of that
            told = {name: value for name, value in line.items() if name != "step"} | self.arrivals.speed()
            self.accelerator.log(told, step=self.step)

    def end(self, judged: bool) -> None:
        """Leave the best weights in the module, or else the average."""
        if judged:
            _copy(self.best, self.changing())
        else:
            _copy(self.average, self.learning())
            self.outcome.best = self.step
        self.outcome.steps, self.outcome.planned = self.step, self.total
        state = self.optimizer.state_dict()["state"].values()
        tensors = [each for own in state for each in own.values() if isinstance(each, Tensor)]
        self.outcome.optimizer_bytes = sum(map(sharding.local_bytes, tensors))

    def train(self) -> None:
        """Switch to training mode: all of the network, or only what keeps running statistics, unless it is frozen."""
        self.module.train(self.recipe.dropout)
        for each in self.module.modules():
            if isinstance(each, nn.modules.batchnorm._BatchNorm):
                own = list(each.parameters()) or list(self.module.parameters())
                each.train(all(parameter.requires_grad for parameter in own))

    def save(self) -> None:
        """Keep everything that the steps to come depend on."""
        self.journal.save(
            {
                "step": self.step,
                "module": self.changing(),
                "optimizer": self.optimizer.state_dict(),
                "average": self.average,
                "best": self.best,
                "outcome": vars(self.outcome),
                "mark": self.arrivals.mark,
            },
            in_pieces=sharding.is_cut(self.module),
        )
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Go on from the last checkpoint, where there is one."""
        groups = self.optimizer.param_groups
        like = Like(self.changing(), [each for group in groups for each in group["params"]])
        state = self.journal.saved(self.accelerator.device, like, in_pieces=sharding.is_cut(self.module))
        if state is not None:
            _copy(state["module"], self.changing())
            now = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**now, **state["optimizer"]})
            self.average, self.best, self.step = state["average"], state["best"], state["step"]
            self.outcome = Outcome(**state["outcome"])
            self.outcome.resumed = self.step
            self.stream.go_on(state.get("mark", {}))
        self.journal.cut(self.step, judged=self.judged)
        self.train()


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)
