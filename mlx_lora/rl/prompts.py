"""Whether the prompts of a task fit the model, before anything is sampled."""

from collections.abc import Sequence

from mlx_lora.data import context_of
from mlx_lora.errors import TaskError
from mlx_lora.models import Loaded, encode_prompt
from mlx_lora.problems import LISTED, readable
from mlx_lora.types import Sample

SHOWN = 60  # characters of a prompt in a message


def refuse_unfit(loaded: Loaded, samples: Sequence[Sample], max_tokens: int) -> None:
    """TaskError that lists prompts without a token, or too long for a completion of `max_tokens`.

    ModelError where the tokenizer has no form for messages. Prompts are encoded once: they stay in
    the cache of `encode_prompt` for the rollouts.
    """
    limit, problems = context_of(loaded), []
    for number, sample in enumerate(samples):
        tokens = len(encode_prompt(loaded.tokenizer, sample.prompt))
        where = sample.place or f"problem {number} ({readable(sample.prompt)[:SHOWN]!r})"
        if not tokens:
            problems.append(f"{where}: the prompt comes to no token")
        elif limit and tokens + max_tokens > limit:
            problems.append(
                f"{where}: the prompt's {tokens:,} tokens and {max_tokens:,} of a completion "
                f"exceed the {limit:,} that the model was made for"
            )
    if problems:
        more = [f"... {len(problems):,} in all"] if len(problems) > LISTED else []
        raise TaskError(
            "\n".join(problems[:LISTED] + more),
            "Leave these problems out, or lower rollout.max_tokens.",
        )
