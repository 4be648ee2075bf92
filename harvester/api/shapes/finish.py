"""Read why an answer ended: the finish words of all known servers, and the members that hold them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Finish(StrEnum):
    """What a finish word says about the answer."""

    END = "end"  # the answer is complete
    TOOLS = "tools"  # the answer is a tool call
    CUT = "cut"  # a limit on tokens cut it
    FILTER = "filter"  # content moderation withheld it
    REFUSAL = "refusal"  # the model refused
    BROKEN = "broken"  # generation failed on the way: the request is tried again


# Finish words, without case and punctuation: `max_tokens`, `MAX_TOKENS` and `maxTokens` are one word.
FINISH_WORDS: dict[str, Finish] = {
    **dict.fromkeys(
        (
            "stop",
            "stopped",
            "stopsequence",
            "stopstring",
            "stoptoken",
            "stopstr",
            "stopword",
            "stopwords",
            "stopstringfound",
            "eos",
            "eosfound",
            "eostoken",
            "eostokenid",
            "eot",
            "endturn",
            "endofturn",
            "endoftext",
            "endofsequence",
            "eotid",
            "imend",
            "end",
            "ended",
            "complete",
            "completed",
            "finish",
            "finished",
            "done",
            "succeeded",
            "success",
            "normal",
        ),
        Finish.END,
    ),
    **dict.fromkeys(("toolcalls", "toolcall", "tooluse", "functioncall"), Finish.TOOLS),
    **dict.fromkeys(
        (
            "length",
            "lengthlimit",
            "maxtokens",
            "maxlength",
            "maxnewtokens",
            "maxoutputtokens",
            "maxtokensreached",
            "maxtokensexceeded",
            "maxcompletiontokens",
            "maxoutputtokensreached",
            "maxpredictedtokensreached",
            "modellength",
            "modelcontextwindowexceeded",
            "contextlengthexceeded",
            "contextwindowexceeded",
            "contextlength",
            "contextlengthreached",
            "tokenlimit",
            "tokenlimitreached",
            "timelimit",
            "maxtime",
            "truncated",
            "incomplete",
            "errorlimit",
        ),
        Finish.CUT,
    ),
    **dict.fromkeys(
        (
            "contentfilter",
            "contentfiltered",
            "filtered",
            "filter",
            "safety",
            "sensitive",
            "moderation",
            "moderated",
            "flagged",
            "recitation",
            "blocklist",
            "blocked",
            "prohibitedcontent",
            "spii",
            "imagesafety",
            "guardrailintervened",
            "modelarmor",
            "errortoxic",
        ),
        Finish.FILTER,
    ),
    **dict.fromkeys(("refusal", "refused"), Finish.REFUSAL),
    **dict.fromkeys(
        (
            "error",
            "networkerror",
            "servererror",
            "internalerror",
            "abort",
            "aborted",
            "cancel",
            "cancelled",
            "canceled",
            "usercancel",
            "userstopped",
            "modelunloaded",
            "malformedfunctioncall",
            "malformedmodeloutput",
            "malformedtooluse",
            "interrupted",
            "insufficientsystemresource",
            "failed",
            "failure",
            "timeout",
            "overloaded",
            "ratelimit",
        ),
        Finish.BROKEN,
    ),
}
# What some servers write as long as an answer has not ended, in place of null.
NO_WORDS = frozenset(
    {"null", "none", "nil", "unspecified", "notfinished", "notstop", "inprogress", "undefined"}
)
# Members that hold the finish word, in the order in which they are asked.
FINISH_MEMBERS = (
    "finish_reason",
    "finishReason",
    "stop_reason",
    "stopReason",
    "done_reason",
    "native_finish_reason",
)

_MAX_PARTS = 3
_LONGEST_NO_WORD = 40
_WORD = re.compile(r"[^a-z0-9]+")


def finish_of(word: Any) -> Finish | None:
    """Return what a finish word says; None for one that is not in the table.

    Of `content_filter: PROHIBITED_CONTENT` the first part counts that is in the table, and any before `stop`.
    """
    if not isinstance(word, str):
        return None
    if word.strip() == "</s>":
        return Finish.END
    if ":" not in word:
        return FINISH_WORDS.get(_plain(word))
    kinds = [kind for part in word.split(":", _MAX_PARTS) if (kind := FINISH_WORDS.get(_plain(part)))]
    return next((kind for kind in kinds if kind is not Finish.END), kinds[0] if kinds else None)


def _plain(word: str) -> str:
    plain = _WORD.sub("", word.lower())
    return plain.removeprefix("finishreason") or plain


def finish_word(*holders: Mapping[str, Any]) -> str:
    """Return the teacher's own finish word: of the first member that has one, "" where none has."""
    for holder in holders:
        for name in FINISH_MEMBERS:
            value = holder.get(name)
            if isinstance(value, Mapping):
                value = next(
                    (value[key] for key in ("type", "reason", *FINISH_MEMBERS) if value.get(key)), None
                )
            if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
                word = str(value)
                if _plain(word[:_LONGEST_NO_WORD]) not in NO_WORDS:
                    return word
    return ""
