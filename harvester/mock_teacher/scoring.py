"""Build the replies of `/v1/completions` and SGLang's `/generate`, with the tokens of the prompt. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harvester.mock_teacher.completions import Completion, Generated, Identity, prompt_logprobs, usage
from harvester.mock_teacher.wire import ChatRequest, ScoreAsk

# Ways to score a given text that the mock teacher speaks: vLLM's field on both routes, the older echo, and
# SGLang's own route.
SCORE_FORMS = ("prompt_logprobs", "echo", "chat", "generate")


def honoured(scoring: ScoreAsk, forms: Sequence[str]) -> ScoreAsk:
    """Return what of a request is honoured; a server that lacks a way ignores its fields."""
    if scoring.route == "chat":
        asked = scoring.prompt_logprobs if "chat" in forms else None
        return replace(scoring, prompt_logprobs=asked)
    if scoring.route == "completions":
        return replace(
            scoring,
            prompt_logprobs=scoring.prompt_logprobs if "prompt_logprobs" in forms else None,
            echo=scoring.echo and "echo" in forms,
        )
    return scoring


def text_completion(ask: ChatRequest, generated: Sequence[Generated], identity: Identity) -> Completion:
    """Return the reply of the route that continues a text."""
    counts = usage(ask.prompt_tokens, generated)
    if ask.scoring.route == "generate":
        return _generate_reply(ask, generated[0], identity, counts)
    return {
        "id": identity.response_id,
        "object": "text_completion",
        "created": identity.created,
        "model": identity.model,
        "choices": [_choice(ask, index, answer) for index, answer in enumerate(generated)],
        "usage": counts,
        "system_fingerprint": identity.fingerprint,
    }


def _choice(ask: ChatRequest, index: int, answer: Generated) -> dict[str, Any]:
    scoring = ask.scoring
    text = "".join(answer.pieces)
    choice = {
        "index": index,
        "text": f"{scoring.text}{text}" if scoring.echo else text,
        "logprobs": None if scoring.legacy_logprobs is None else _legacy(scoring, answer),
        "finish_reason": answer.finish_reason,
    }
    if scoring.prompt_logprobs is not None:
        choice["prompt_logprobs"] = prompt_logprobs([answer])
    return choice


def _legacy(scoring: ScoreAsk, answer: Generated) -> dict[str, Any]:
    """Return the parallel lists of the older completions, those of an echoed prompt first."""
    echoed = answer.prompt if scoring.echo else ()
    entries = answer.entries or []
    texts = [token.text for token in echoed] + [entry["token"] for entry in entries]
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in echoed] + [entry["logprob"] for entry in entries],
        "top_logprobs": [
            {text: value for _, text, value in token.top} if token.logprob is not None else None
            for token in echoed
        ]
        + [{other["token"]: other["logprob"] for other in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
    }


def _generate_reply(
    ask: ChatRequest, answer: Generated, identity: Identity, counts: dict[str, Any]
) -> Completion:
    about: dict[str, Any] = {
        "id": identity.response_id,
        "finish_reason": {"type": answer.finish_reason},
        "prompt_tokens": counts["prompt_tokens"],
        "completion_tokens": counts["completion_tokens"],
        "cached_tokens": 0,
    }
    if ask.scoring.input_logprobs:
        about["input_token_logprobs"] = [[token.logprob, token.number, token.text] for token in answer.prompt]
        if ask.scoring.input_top:
            about["input_top_logprobs"] = [
                [[value, number, text] for number, text, value in token.top] or None
                for token in answer.prompt
            ]
    return {"text": "".join(answer.pieces), "meta_info": about}
