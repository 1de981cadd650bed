"""Build the embedded model: tokenizer, training, evaluation, card. Deterministic from --seed.

    python scripts/build_demo_model.py

Llama-shaped, about a million parameters, one token per whole number up to 99. Trains in float32
with MLX (a system OpenBLAS makes it four times faster on Linux) and stores bf16.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from demo_corpus import problems, question, story
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

import mlx_lora.cpu  # first: on Linux the package puts OpenBLAS in place before MLX loads
from mlx_lora import models
from mlx_lora.rl.evaluate import evaluate
from mlx_lora.tasks import load_task

ASSETS = Path(mlx_lora.__file__).parent / "assets"
CARD = "card.json"
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>"]
TAGS = ["<answer>", "</answer>", "<think>", "</think>"]
END, USER, ASSISTANT = range(3)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ARGS = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 5,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1024,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def build_tokenizer(rng: random.Random) -> Tokenizer:
    """Byte-level BPE, so any UTF-8 round-trips; whole numbers to 99 are one token each."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?[0-9]{1,2}| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+"),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    numbers = [f"{space}{n}" for n in range(100) for space in (" ", "")]
    corpus = [n for n in numbers for _ in range(20_000)]
    corpus += [f" {op}" for op in "+-*/()=" for _ in range(20_000)]
    for _ in range(20_000):
        corpus += [story(rng), *question(rng)]
    trainer = trainers.BpeTrainer(
        vocab_size=ARGS["vocab_size"] - len(TAGS),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in TAGS])
    single = [n for n in numbers if len(tokenizer.encode(n).ids) != 1]
    assert not single, f"these numbers are not one token: {single}"
    return tokenizer


def chat(tokenizer: Tokenizer, user: str, answer: str) -> tuple[list[int], int]:
    """Token ids and the index of the first one to learn from."""
    head = [USER, *tokenizer.encode(user).ids, END, ASSISTANT]
    return [*head, *tokenizer.encode(answer).ids, END], len(head)


def plain(tokenizer: Tokenizer, text: str) -> tuple[list[int], int]:
    return [*tokenizer.encode(text).ids, END], 1


def pad(rows: list[tuple[list[int], int]]) -> tuple[mx.array, mx.array]:
    """ids [B, T] and the mask of learnt targets [B, T-1]."""
    width = max(len(ids) for ids, _ in rows)
    ids = np.full((len(rows), width), END, np.int32)
    mask = np.zeros((len(rows), width - 1), np.float32)
    for r, (row, start) in enumerate(rows):
        ids[r, : len(row)] = row
        mask[r, start - 1 : len(row) - 1] = 1
    return mx.array(ids), mx.array(mask)


def nll(model: nn.Module, ids: mx.array, mask: mx.array) -> mx.array:
    logits = model(ids[:, :-1])
    return (nn.losses.cross_entropy(logits, ids[:, 1:]) * mask).sum() / mask.sum()


def train(tokenizer: Tokenizer, steps: int, games: int, texts: int, peak: float, seed: int):
    """Two batches a step, of Countdown and of text; warm-up, then cosine to zero."""
    model = Model(ModelArgs.from_dict(ARGS))
    optimizer = optim.AdamW(learning_rate=peak, betas=[0.9, 0.98], weight_decay=0.02)
    rng = random.Random(seed)
    puzzles = problems(rng)

    def loss_fn(model, game, text):
        return nll(model, *game) + nll(model, *text)

    step_fn = nn.value_and_grad(model, loss_fn)
    begin = time.time()
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.learning_rate = peak * min(1, (step + 1) / 50) * cosine
        game = pad([chat(tokenizer, *next(puzzles)) for _ in range(games)])
        rows = [plain(tokenizer, story(rng)) for _ in range(texts // 2)]
        rows += [chat(tokenizer, *question(rng)) for _ in range(texts // 2)]
        loss, grads = step_fn(model, game, pad(rows))
        grads, _ = optim.clip_grad_norm(grads, 1.0)
        optimizer.update(model, grads)
        mx.eval(model.parameters(), optimizer.state, loss)
        if step % 25 == 24:
            print(
                f"step {step + 1}  {time.time() - begin:.0f} s  loss {loss.item():.4f}", flush=True
            )
    return model, {
        "steps": steps,
        "countdown_rows": games,
        "text_rows": texts,
        "learning_rate": peak,
        "seed": seed,
    }


def save(model: nn.Module, tokenizer: Tokenizer, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    weights = tree_map(lambda p: p.astype(mx.bfloat16), model.parameters())
    mx.save_safetensors(
        str(out / "model.safetensors"), dict(tree_flatten(weights)), {"format": "mlx"}
    )
    config = ARGS | {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": END,
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": SPECIAL[END],
                "pad_token": SPECIAL[END],
                "clean_up_tokenization_spaces": False,
                "model_max_length": ARGS["max_position_embeddings"],
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
        + "\n"
    )


def check_rows(rng: random.Random) -> list[dict[str, str]]:
    """Held-out text for the corruption check: stories, answers, test problems of Countdown."""
    rows = [{"text": story(rng)} for _ in range(12)]
    for asked, answer in (question(rng) for _ in range(12)):
        rows.append({"prompt": asked, "completion": answer})
    held_out = load_task("countdown").load("test", 8, 1)
    rows += [{"prompt": s.prompt, "completion": s.gold} for s in held_out]
    rows += [{"prompt": question(rng)[0]} for _ in range(4)]
    rows += [
        {"prompt": f"Tell me a story about {who}."} for who in ("Anna", "Felix", "Nora", "Tom")
    ]
    return rows


def held_out_perplexity(loaded: models.Loaded, rng: random.Random, count: int = 200) -> float:
    """exp of the mean nats per token of fresh stories, read as plain text."""
    end = min(models.eos_ids(loaded.tokenizer))
    rows = [([*loaded.tokenizer.encode(story(rng)), end], 1) for _ in range(count)]
    ids, mask = pad(rows)
    return math.exp(np.array(nll(loaded.model, ids, mask)))


def card_of(folder: Path, training: dict) -> dict:
    """What the model is and how good: measured on text and problems that it never saw."""
    sizes = mx.load(str(folder / "model.safetensors")).values()
    card = {"training": training, "parameters": sum(x.size for x in sizes), "results": {}}
    for name, quantize in (("bf16", {"bits": None}), ("4 bit", models.DEMO_QUANTIZATION)):
        loaded = models.load(str(folder), quantize=quantize)
        found = evaluate(loaded, load_task("countdown"), n=1000, max_tokens=16)
        card["results"][name] = {
            "countdown": found,
            "perplexity": round(held_out_perplexity(loaded, random.Random("held out")), 3),
        }
    return card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS / "demo_model")
    parser.add_argument("--steps", type=int, default=1100)
    parser.add_argument("--games", type=int, default=96, help="Countdown rows a step")
    parser.add_argument("--texts", type=int, default=40, help="text rows a step")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card-only", action="store_true", help="measure the model that is there")
    args = parser.parse_args()
    mx.random.seed(args.seed)
    mlx_lora.cpu.settle()
    if args.card_only:
        training = json.loads((args.out / CARD).read_text())["training"]
    else:
        tokenizer = build_tokenizer(random.Random(args.seed))
        model, training = train(tokenizer, args.steps, args.games, args.texts, args.peak, args.seed)
        save(model, tokenizer, args.out)
        rows = check_rows(random.Random(f"check/{args.seed}"))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out.parent / "check_demo.jsonl").write_text(lines)
    card = card_of(args.out, training)
    (args.out / CARD).write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    main()
