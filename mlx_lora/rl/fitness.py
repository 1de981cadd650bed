"""From what a population earned to the weight of each member in the update.

Functions of rewards [P, G], P problems that all G members met, returning [G]. A member's fitness is
its mean reward. Where all members are equally fit the weights are 0 to the bit.
"""

from collections.abc import Callable

import numpy as np

from mlx_lora.optimizers import Metrics
from mlx_lora.registry import Table

fitnesses: Table[Callable[..., np.ndarray]] = Table("fitness")


@fitnesses.add
def z_score(rewards_PG: np.ndarray) -> np.ndarray:
    """Fitness in standard deviations of the population. Source: Qiu et al., arXiv 2509.24372.

    >>> z_score(np.array([[1.0, 0.0]]))
    array([ 1., -1.])
    """
    return standardised(means(rewards_PG))


@fitnesses.add
def centered_rank(rewards_PG: np.ndarray) -> np.ndarray:
    """z_score of the ranks, equals sharing theirs: no outlier leads. After arXiv 1703.03864.

    >>> centered_rank(np.array([[9.0, 0.0, 1.0]])).round(2)
    array([ 1.22, -1.22,  0.  ])
    """
    fitness_G = means(rewards_PG)
    below_GG = (fitness_G[:, None] > fitness_G).astype(float)
    return standardised((below_GG + 0.5 * (fitness_G[:, None] == fitness_G)).sum(axis=1))


@fitnesses.add
def global_std(rewards_PG: np.ndarray) -> np.ndarray:
    """Fitness less its mean, over the std of all rewards: members that hardly differ move little.

    Source: EGGROLL, arXiv 2511.16652.

    >>> global_std(np.array([[1.0, 1.0], [1.0, 0.0]])).round(2)
    array([ 0.58, -0.58])
    """
    fitness_G = means(rewards_PG)
    if np.ptp(fitness_G) == 0:
        return np.zeros(len(fitness_G))
    return (fitness_G - fitness_G.mean()) / rewards_PG.std()


def means(rewards_PG: np.ndarray) -> np.ndarray:
    """Each member's fitness [G]; equal means are equal to the bit, however they came about."""
    return np.round(np.mean(rewards_PG, axis=0), 12)


def standardised(values_G: np.ndarray) -> np.ndarray:
    if np.ptp(values_G) == 0:
        return np.zeros(len(values_G))
    return (values_G - values_G.mean()) / values_G.std()


def measured(rewards_PG: np.ndarray) -> Metrics:
    """Fitness over the population, and how much of it is more than the choice of problems.

    The correlation is that of the members' fitness on two halves of the problems: 1 where the
    problems agree about who is fit, 0 where fitness is noise. Missing where it is not defined.
    """
    fitness_G = means(rewards_PG)
    found: Metrics = {
        "fitness_mean": float(fitness_G.mean()),
        "fitness_std": float(fitness_G.std()),
        "fitness_min": float(fitness_G.min()),
        "fitness_max": float(fitness_G.max()),
    }
    if len(rewards_PG) < 2:
        return found
    even_G, odd_G = (means(rewards_PG[half::2]) for half in (0, 1))
    if np.ptp(even_G) > 0 and np.ptp(odd_G) > 0:
        found["fitness_correlation"] = float(np.corrcoef(even_G, odd_G)[0, 1])
    return found
