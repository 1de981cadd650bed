"""The forms a row of SFT data may have, and such a row as token ids: mlx-lm's, to the token.

`text` is read whole. `completions` (a prompt and a completion) and `chat` (messages, with tools
where there are some) go through the model's chat template.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_lora.blocks import HfDataset
from mlx_lora.data import Row, Text, end_of
from mlx_lora.models import eos_ids
from mlx_lora.schema import Stage

Form = Literal["completions", "chat", "text"]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Features:
    """Under which key a row keeps what."""

    prompt: str = "prompt"
    completion: str = "completion"
    chat: str = "messages"
    text: str = "text"

    @classmethod
    def of(cls, block: Stage | HfDataset) -> "Features":
        names = {
            f: getattr(block, f"{f}_feature") for f in ("prompt", "completion", "chat", "text")
        }
        return cls(**{field: name for field, name in names.items() if name})

    def form_of(self, row: Row) -> Form | None:
        """The form of a row, looked for in mlx-lm's order; None where it is of no form.

        >>> Features().form_of({"prompt": "a", "completion": "b", "text": "c"})
        'completions'
        """
        if self.prompt in row and self.completion in row:
            return "completions"
        if self.chat in row:
            return "chat"
        return "text" if self.text in row else None

    def in_words(self) -> str:
        return f'"{self.text}", "{self.prompt}" and "{self.completion}", or "{self.chat}"'

    def problem(self, row: Row, form: Form) -> str | None:
        """What keeps a row from being read in that form."""
        if form == "chat":
            return problem_of_messages(row[self.chat], self.chat)
        keys = (self.text,) if form == "text" else (self.prompt, self.completion)
        for key in keys:
            if not isinstance(row[key], str):
                return f'"{key}" should be a string, not {type(row[key]).__name__}'
            if not row[key] and key != self.completion:
                return f'"{key}" is empty'
        return None


def problem_of_messages(messages: Any, key: str) -> str | None:
    if not isinstance(messages, list) or not messages:
        return f'"{key}" should be a list of messages'
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f'"{key}"[{number}] should have a "role" and a "content"'
        if "content" not in message and "tool_calls" not in message:
            return f'"{key}"[{number}] has neither "content" nor "tool_calls"'
    return None


@dataclass(frozen=True)
class Lesson:
    """A row to learn from."""

    text: Text
    straight: bool = True  # the prompt's tokens begin the whole's, so that the mask is exact


def lesson_of(
    row: Row, form: Form, features: Features, tokenizer: Any, *, mask_prompt: bool
) -> Lesson:
    """The row as token ids, and where its loss begins. Raises what the chat template raises."""
    if form == "text":
        ids = tuple(tokenizer.encode(row[features.text]))
        ends = ids and ids[-1] in eos_ids(tokenizer)
        return Lesson(Text(ids if ends else (*ids, end_of(tokenizer)), 1))
    tools = row.get("tools") or None
    if form == "chat":
        messages: Messages = row[features.chat]
        answers = messages[-1].get("role") == "assistant"
    else:
        contents = {"user": row[features.prompt], "assistant": row[features.completion]}
        messages = [{"role": role, "content": text} for role, text in contents.items()]
        answers = True
    template = template_of(tokenizer, plain=form == "completions")
    ids = template(messages, tools, False)
    if not mask_prompt:
        return Lesson(Text(ids, 1))
    head = template(messages[:-1], tools, answers) if len(messages) > 1 else ()
    return Lesson(Text(ids, max(1, len(head))), straight=ids[: len(head)] == head)


def template_of(tokenizer: Any, *, plain: bool) -> Callable[[Messages, Any, bool], tuple[int, ...]]:
    """(messages, tools, open for an answer) -> token ids.

    A tokenizer without a chat template, with which mlx-lm stops, writes prompt and completion one
    behind the other where they are `plain`. ValueError for messages.
    """
    if getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", None)):

        def templated(messages: Messages, tools: Any, opened: bool) -> tuple[int, ...]:
            more = {"add_generation_prompt": True} if opened else {}
            ids = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **more)
            return tuple(ids)

        return templated
    if not plain:
        raise ValueError("the tokenizer has no chat template: use text, or prompt and completion")

    def joined(messages: Messages, tools: Any, opened: bool) -> tuple[int, ...]:
        head = tuple(tokenizer.encode(messages[0]["content"]))
        if len(messages) == 1:
            return head
        tail = tokenizer.encode(messages[1]["content"], add_special_tokens=False)
        return (*head, *tail, end_of(tokenizer))

    return joined
