"""Say how rows of prompt files become prompts: `[prompts] last_assistant`, `template`, `row_settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from harvester.config.config import PromptsSection, SamplingSection
from harvester.errors import PromptError
from harvester.prompts.template import PromptTemplate

LastAssistant = Literal["send", "reference"]


@dataclass(frozen=True)
class RowRules:
    """The rules for all rows of a harvest.

    Attributes:
        last_assistant: what becomes of an assistant turn at the end: "send" leaves it among the messages;
            "reference" takes its text as the reference, unless the row names one itself.
        template: writes the text of the prompt from the row's fields; None: the row holds prompt or messages.
        settings: names of `[sampling]` that a row may hold for its own request.
    """

    last_assistant: LastAssistant = "send"
    template: PromptTemplate | None = None
    settings: tuple[str, ...] = ()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What turns the same row into another request, by name; empty for the rules that hold by default."""
        rules = {
            "last_assistant": None if self.last_assistant == "send" else self.last_assistant,
            "template": self.template and self.template.sha256,
            "row_settings": sorted(self.settings),
        }
        return {name: value for name, value in rules.items() if value}

    def settings_of(self, fields: Mapping[str, Any], place: str) -> dict[str, Any]:
        """Return the settings that a row holds, as `[sampling]` would hold them.

        Raises:
            PromptError: a value that `[sampling]` would not take.
        """
        given = {name: fields[name] for name in self.settings if fields.get(name) is not None}
        if not given:
            return {}
        try:
            checked = SamplingSection.model_validate(given)
        except ValidationError as error:
            (first, *_) = error.errors()
            name = str(first["loc"][0])
            raise PromptError(
                f"{name}: {first['msg']}",
                place=place,
                remedy="a row may hold what [sampling] takes; null and a missing field are alike",
            ) from None
        values = {name: getattr(checked, name) for name in given}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def rules_of(prompts: PromptsSection, root: Path) -> RowRules:
    """Return the rules of a configuration; the template's file lies relative to `root`.

    Raises:
        ConfigError: the template can't be read, or is no template.
    """
    template = None if prompts.template is None else PromptTemplate.load(root / prompts.template)
    return RowRules(prompts.last_assistant, template, prompts.row_settings)
