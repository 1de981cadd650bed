"""The data that `data: demo` names: solved Countdown problems as chats, for SFT without a download.

    python scripts/build_demo_data.py

Writes mlx_lora/assets/demo_data/{train,valid,test}.jsonl. All of it is from the task's training
problems: the problems that `eval` measures are held out of it.
"""

import json
from pathlib import Path

from mlx_lora.tasks import load_task

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "mlx_lora" / "assets" / "demo_data"
ROWS, SEED = {"train": 512, "valid": 64, "test": 64}, 0


def main() -> None:
    total = sum(ROWS.values())
    problems = load_task("countdown").load("train", 2 * total, SEED)
    samples = list({s.prompt: s for s in problems}.values())[:total]
    assert len(samples) == total, "too few distinct problems"
    FOLDER.mkdir(parents=True, exist_ok=True)
    begin = 0
    for name, count in ROWS.items():
        rows = samples[begin : begin + count]
        begin += count
        chats = (
            {
                "messages": [
                    {"role": "user", "content": s.prompt},
                    {"role": "assistant", "content": s.gold},
                ]
            }
            for s in rows
        )
        text = "".join(json.dumps(chat) + "\n" for chat in chats)
        (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
