"""Evolution strategies on a quantized model's adapter: no gradient, only rollouts of a population.

Each generation perturbs one factor of every LoRA layer in many directions at once, lets all members
solve the same problems, and moves the factor toward those that did better. After Qiu et al. (arXiv
2509.24372) and EGGROLL (arXiv 2511.16652). Left out on purpose: elites, crossover, a learned sigma.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora import distributed
from mlx_lora.adapter.attach import assert_no_update, lora_layers, remembers_start
from mlx_lora.adapter.population import Factor, Noise, population, sigma_of
from mlx_lora.adapter.schedules import scale_of
from mlx_lora.data import POOL, cycled
from mlx_lora.errors import ConfigError
from mlx_lora.models import Loaded
from mlx_lora.optimizers import Metrics
from mlx_lora.rl.describe import describe
from mlx_lora.rl.fitness import fitnesses, measured
from mlx_lora.rl.rollout import plain, restored, rewards, sampled
from mlx_lora.runlog import Clock
from mlx_lora.schema import Stage
from mlx_lora.types import Group, Sample, Task

Sigmas = Mapping[str, float]  # by module
Factors = Mapping[str, mx.array]  # by `<module>.<factor>`


def train(
    loaded: Loaded,
    task: Task,
    experiment: Stage,
    optimizer: optim.Optimizer,
    clock: Clock,
    report: Callable[[int, Metrics, Sequence[Group]], None],
    *,
    start: int = 0,
    history: Sequence[Metrics] = (),
    anchor: Factors | None = None,
    look: Callable[[int], Metrics] = lambda generation: {},
) -> Iterator[int]:
    """Run the generations from `start` to `iters`, one at each `next`, yielding the one just done.

    Everything random is a function of (seed, generation, member). `history` holds the metrics
    before `start`; `anchor` the factors that the stage began with; `look` measures what is not
    needed to learn.
    """
    model, e = loaded.model, experiment
    in_full(model)
    optimizer.init(model.trainable_parameters())  # of both factors, whichever comes first
    anchor = factors(model) if anchor is None else anchor
    skipped = int(history[-1]["generations_skipped"]) if history else 0
    samples, fit = problems(task, e), fitnesses.bind(e.es.fitness, {})
    if not start and not remembers_start(model):
        assert_no_update(model)  # generation 0 is the base
    for generation in range(start, e.iters):
        noise = noise_of(e, generation)
        with clock.measure("noise", kind="step"):
            sigmas = sizes(model, e, noise.factor)
        drawn = cycled(samples, generation, e.es.samples_per_generation, e.seed)
        with clock.measure("rollout", kind="step"):
            groups = tried(loaded, task, drawn, e, noise, sigmas, clock)
        rewards_PG = rewards(groups)
        weights_G = fit(rewards_PG)
        metrics = describe(groups, rewards_PG) | measured(rewards_PG) | {"scale": scale_of(model)}
        optimizer.learning_rate = rate(e, generation)
        if weights_G.any():
            with clock.measure("update", kind="step"):
                metrics |= update(model, optimizer, noise, sigmas, weights_G, anchor, e.es.anchor)
        else:
            skipped += 1
        metrics |= {"generations_skipped": skipped, "distance": distance(model, anchor)}
        metrics |= look(generation)
        report(generation, metrics, groups)
        yield generation


def problems(task: Task, e: Stage) -> Sequence[Sample]:
    """Training problems, of which each generation draws some."""
    once = e.es.samples_per_generation
    return task.load("train", min(e.iters * once, max(POOL, once)), e.seed)


def rate(e: Stage, generation: int) -> float:
    """The optimizer's rate, in sigmas. To Adam all gradients are alike: the population comes in."""
    usual = e.es.step_scale * (1 - generation / e.iters)
    return usual / math.sqrt(e.es.population) if e.optimizer == "adam" else usual


def refuse_shortage(task: Task, e: Stage) -> None:
    """ConfigError where a task has fewer problems than the experiment asks for at once."""
    asked = {"samples_per_generation": ("train", e.es.samples_per_generation)}
    if e.eval.every or "test_samples" in e.es.model_fields_set:
        asked["test_samples"] = ("test", e.es.test_samples)
    lines = []
    for key, (split, wanted) in asked.items():
        there = len(task.load(split, wanted, 0))
        if there < wanted:
            lines.append(f"es.{key} is {wanted}; task {task.name} has {there} {split} problems")
    if lines:
        raise ConfigError("\n".join(lines), "Lower it, or give the task more problems.")
    problems(task, e)  # which says itself what it lacks


def noise_of(e: Stage, generation: int) -> Noise:
    """B's turn, or where factors alternate A's, B's first: A moves nothing while B is zero."""
    turn = e.es.factor == "alternate" and generation // e.es.turn % 2
    factor: Factor = "lora_a" if turn else "lora_b"
    return Noise(e.seed, generation, factor, e.es.noise, e.es.antithetic)


def sizes(model: nn.Module, e: Stage, factor: Factor) -> Sigmas:
    """Standard deviation of the noise in each module's factor."""
    layers = lora_layers(model)
    if e.es.sigma is not None:
        return dict.fromkeys(layers, e.es.sigma)
    return {name: sigma_of(m, factor, e.es.perturb_scale) for name, m in layers.items()}


def tried(
    loaded: Loaded,
    task: Task,
    samples: Sequence[Sample],
    e: Stage,
    noise: Noise,
    sigmas: Sigmas,
    clock: Clock,
) -> list[Group]:
    """A group for each problem, of a completion by each member; each machine asks its part of them.

    All members meet a problem with the same random numbers. What the machines tell each other is
    what members wrote and earned.
    """
    members = list(distributed.mine(range(e.es.population)))

    def part() -> list[Group]:
        """A group for each member, of all problems."""
        pairs = [(p, g) for p in range(len(samples)) for g in range(len(members))]
        places = [g for _, g in pairs]
        crowd = population(loaded.model, noise, sigmas, members, places)
        with contextlib.ExitStack() as stack:
            with clock.measure("noise", kind="step"):
                sit = stack.enter_context(crowd)
            found = sampled(
                loaded,
                task,
                [samples[p] for p, _ in pairs],
                group=1,
                seed=e.seed,
                step=noise.generation,
                numbers=[p for p, _ in pairs],
                sit=sit,
                clock=clock,
                **e.rollout.model_dump(),
            )
        return [regrouped(samples[0], found[g :: len(members)], 0) for g in range(len(members))]

    if distributed.size() == 1:
        by_member = part()
    else:
        said = distributed.everything(lambda: [told(g) for g in part()] if members else [])
        by_member = [restored(samples[0], record) for record in said]
    return [regrouped(sample, by_member, p) for p, sample in enumerate(samples)]


def told(group: Group) -> dict[str, Any]:
    """A group in plain data."""
    return {"rollouts": plain(group.rollouts), "rewards": plain(group.rewards)}


def regrouped(sample: Sample, groups: Sequence[Group], place: int) -> Group:
    """The completions at one place of each group."""
    return Group(sample, [g.rollouts[place] for g in groups], [g.rewards[place] for g in groups])


def update(
    model: nn.Module,
    optimizer: optim.Optimizer,
    noise: Noise,
    sigmas: Sigmas,
    weights_G: np.ndarray,
    anchor: Factors,
    share: float,
) -> Metrics:
    """Move the factor along the weighted mean of the directions, then some way back to its start.

    The optimizer counts in sigmas: its rate is a step of that many for a mean of length 1.
    """
    layers = lora_layers(model)
    directions, signs = noise.of(range(len(weights_G)))
    used = sorted(set(directions))
    pull_K = np.zeros(len(used), np.float32)
    np.add.at(pull_K, directions, (weights_G * signs / len(weights_G)).astype(np.float32))
    gradient = {}
    for name, layer in layers.items():
        shape = layer[noise.factor].shape
        noise_KX = noise.drawn(name, used, shape).reshape(len(used), -1)
        gradient[f"{name}.{noise.factor}"] = -(mx.array(pull_K)[None] @ noise_KX).reshape(shape)
    still = tree_unflatten([(k, mx.zeros_like(g)) for k, g in gradient.items()])
    steps: Any = tree_flatten(optimizer.apply_gradients(tree_unflatten([*gradient.items()]), still))
    length = mx.array(0.0)
    for key, step in steps:
        name = key.rpartition(".")[0]
        master = layers[name][noise.factor]
        moved = sigmas[name] * step - share * (master - anchor[key])
        layers[name][noise.factor] = master + moved
        length = length + mx.square(moved).sum()
    mx.eval(model.trainable_parameters(), optimizer.state, length)
    return {"update_norm": float(mx.sqrt(length)), "learning_rate": float(optimizer.learning_rate)}


def in_full(model: nn.Module) -> None:
    """Make the factors float32: an update is far smaller than what half precision resolves."""
    for layer in lora_layers(model).values():
        layer.lora_a, layer.lora_b = (layer[f].astype(mx.float32) for f in ("lora_a", "lora_b"))


def factors(model: nn.Module) -> Factors:
    """The factors as they are."""
    found: Any = tree_flatten(model.trainable_parameters())
    return dict(found)


def distance(model: nn.Module, anchor: Factors) -> float:
    """L2 norm of what the stage has changed in the factors."""
    squares = [mx.square(value - anchor[k]).sum() for k, value in factors(model).items()]
    return float(mx.sqrt(mx.stack(squares).sum()))
