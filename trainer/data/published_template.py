"""Find a chat template that renders, on any server and any day, the prompts that were learned.

A server calls a template without the variables that training passes. What they decide is written into the
template itself, and the result is compared with what training renders. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, combinations

from trainer.config import TrainConfig
from trainer.data.chat_template import TEMPLATE_DATE, TEMPLATE_TIMEOUT_S, Renderer
from trainer.data.conversation import Conversation, as_conversation
from trainer.errors import StudentError
from trainer.process import time_limit

# Assignments written before a template for the variables that training passes to it and a server does not.
_FIXED_CHOICES = (f'{{%- set date_string = "{TEMPLATE_DATE}" -%}}', "{%- set enable_thinking = false -%}")
# Variables that a server passes all the same: llama.cpp's gives the template the day's date.
_PASSED_BY_SERVERS: tuple[dict[str, str], ...] = ({}, {"date_string": "01 Jan 1970"})
_QUESTION = {"role": "user", "content": "hi"}
_TURNS = [_QUESTION, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"}]
_SYSTEM = {"role": "system", "content": "Be brief."}
_TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Find a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}
# Conversations that a published template must render as training did. A template may refuse some of them.
PROBES = (
    as_conversation([_QUESTION]),
    as_conversation(_TURNS),
    as_conversation([_SYSTEM, _QUESTION]),
    as_conversation([_SYSTEM, *_TURNS]),
    Conversation((_QUESTION,), (_TOOL,)),
)


def keeps_reasoning(config: TrainConfig, renderer: Renderer) -> bool:
    """Whether the student was taught to begin its answers with reasoning, in the template's own format."""
    return config.data.reasoning == "keep" and renderer.chat_shape.reasoning is not None


def pinned_template(renderer: Renderer, *, thinking: bool) -> str:
    """Return a chat template that renders the learned prompts without being given any variable.

    A server passes today's date or none, and no `enable_thinking`, to the template, and its clock runs. If
    its prompts would then differ from those that were learned, they are set at the start of the template.

    Raises:
        StudentError: no assignment makes the template render the prompts that were learned.
    """
    original = str(renderer.tokenizer.chat_template)
    probes = [probe for probe in PROBES if renderer.accepts(probe)]
    wanted = [renderer.learned_prompt(probe, thinks=thinking) for probe in probes]
    sizes = range(len(_FIXED_CHOICES) + 1)
    for chosen in chain.from_iterable(combinations(_FIXED_CHOICES, size) for size in sizes):
        template = renderer.fixed_clock + "".join(chosen) + original
        if all(
            [_as_served(renderer, template, probe, passed) for probe in probes] == wanted
            for passed in _PASSED_BY_SERVERS
        ):
            return template
    raise StudentError(
        "a server would render other prompts than were learned: the template puts text before the answer",
        place="student.template",
        remedy='a template whose generation prompt ends in that text, or [data] reasoning = "keep"',
    )


def template_to_publish(renderer: Renderer, *, thinking: bool) -> tuple[str, str]:
    """Return the template to publish, and what is wrong with it ("" if nothing).

    A template that can't be pinned does not end a training that is finished: it is published as it is.

    Args:
        thinking: whether the student was taught to begin its answers with reasoning.
    """
    try:
        return pinned_template(renderer, thinking=thinking), ""
    except StudentError as error:
        return str(renderer.tokenizer.chat_template), error.message


def serving_template(config: TrainConfig, renderer: Renderer) -> tuple[str, str]:
    """Return `template_to_publish` for a configuration."""
    return template_to_publish(renderer, thinking=keeps_reasoning(config, renderer))


def served_texts(renderer: Renderer, template: str, conversations: Sequence[Conversation]) -> list[str]:
    """Render prompts as a server does.

    Args:
        template: the published chat template.
    """
    return [_as_served(renderer, template, conversation) for conversation in conversations]


def served_prompts(
    renderer: Renderer, texts: Sequence[str], conversations: Sequence[Conversation]
) -> list[list[int] | None]:
    """Return the ids of prompts as a server makes them: it encodes the whole rendered text.

    Args:
        texts: from `served_texts`.

    Returns:
        None for a prompt whose texts contain special tokens: a server would take them for control tokens.
    """
    ids = renderer.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [
        None if renderer.has_special_text(conversation) else prompt
        for conversation, prompt in zip(conversations, ids, strict=True)
    ]


def _as_served(
    renderer: Renderer, template: str, prompt: Conversation, passed: Mapping[str, str] | None = None
) -> str:
    """Render a prompt as a server does; "" if the template refuses it.

    Args:
        passed: variables that the server gives the template.
    """
    try:
        with time_limit(TEMPLATE_TIMEOUT_S):
            text = renderer.tokenizer.apply_chat_template(
                renderer.with_known_roles(prompt.messages),
                tools=list(prompt.tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                **(passed or {}),
            )
    except Exception:  # noqa: BLE001 - jinja raises whatever the template's author chose
        return ""
    return str(text)
