"""The prompts that a model is calibrated on."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sgl_lim.programs.problems import DEFAULT_PROMPT_TEMPLATE, PLACEHOLDER
from sgl_lim.tasks import jsonl


class PromptError(ValueError):
    """Prompts cannot be used; the message names the flag, the file and what to change."""


def file_prompts(paths: Iterable[Path]) -> list[str]:
    """Prompts of all files in order: of a `.jsonl` file one a line, of any other file its text.

    A line is an object with `prompt`, or with `problem`, which is asked as `sgl_lim.programs` asks it; other keys are
    ignored, blank lines skipped.

    Raises:
        PromptError: a file cannot be read or has no prompt, or a line is something else.
    """
    prompts: list[str] = []
    for path in paths:
        text = _read(path)
        if path.suffix != ".jsonl":
            found = [text.strip("\n")] if text.strip() else []
        else:
            lines = enumerate(text.split("\n"), start=1)
            found = [_parse_line(line, f"{path}:{number}") for number, line in lines if line.strip()]
        if not found:
            raise PromptError(f"--prompts {path}: no prompt in it")
        prompts += found
    return prompts


def encode(prompts: Sequence[str], tokenizer: Any, *, chat: bool) -> list[list[int]]:
    """Token ids of each prompt, with the special tokens that a prompt gets.

    Args:
        tokenizer: of transformers.
        chat: whether each prompt is a user turn of the tokenizer's chat template.

    Raises:
        PromptError: the tokenizer has no chat template.
    """
    if not chat:
        return [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError("--chat: the model's tokenizer has no chat template; leave the flag out")
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    # The template writes special tokens itself.
    return [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


def _read(path: Path) -> str:
    try:
        return jsonl.decode(path.read_bytes())
    except OSError as error:
        raise PromptError(f"--prompts {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PromptError(f"--prompts {path}: not UTF-8 text (byte {error.start})") from error


def _parse_line(line: str, where: str) -> str:
    try:
        row = jsonl.parse_object(line)
    except ValueError as error:
        raise PromptError(f"--prompts {where}: {error}") from error
    key = next((key for key in ("prompt", "problem") if key in row), None)
    if key is None:
        raise PromptError(f"--prompts {where}: neither 'prompt' nor 'problem'; the line has {sorted(row)}")
    text = row[key]
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f"--prompts {where}: {key!r} must be a text that is not empty, got {text!r:.80}")
    return text if key == "prompt" else DEFAULT_PROMPT_TEMPLATE.replace(PLACEHOLDER, text)
