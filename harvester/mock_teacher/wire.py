"""Parse chat requests and build error bodies, in OpenAI's format. No I/O.

A body that breaks a rule raises `Refusal` with the status and error object OpenAI's API would use.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import orjson

from harvester.mock_teacher import tokens

Headers = list[tuple[bytes, bytes]]

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
_TRANSPORT_ONLY = ("stream", "stream_options")
# Fields of a chat request that vLLM adds for scoring.
_CHAT_SCORING = frozenset({"prompt_logprobs", "add_generation_prompt", "continue_final_message"})


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    """Return OpenAI's error object as JSON bytes."""
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


class Refusal(Exception):
    """The request is refused: nothing is generated or charged."""

    def __init__(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.headers = headers or []


@dataclass(frozen=True, slots=True)
class ScoreAsk:
    """What a request wants to know of its own prompt's tokens, and what the prompt is.

    Attributes:
        route: "chat", "completions" or "generate" (SGLang's own).
        text: the prompt as it is, for the routes without a chat template.
        echo: repeat the prompt before the answer.
        prompt_logprobs: alternatives for each token of the prompt (vLLM); None: not asked for.
        legacy_logprobs: alternatives for each token in the lists of the older completions.
        input_logprobs: SGLang's `return_logprob`; input_top: alternatives for each of these tokens.
        special: add the tokenizer's special tokens to `text`.
        opens_answer: let the chat template begin an answer after the last turn.
        continues: leave the last turn open.
    """

    route: str = "chat"
    text: str | None = None
    echo: bool = False
    prompt_logprobs: int | None = None
    legacy_logprobs: int | None = None
    input_logprobs: bool = False
    input_top: int = 0
    special: bool = True
    opens_answer: bool = True
    continues: bool = False

    @property
    def wants_scores(self) -> bool:
        """Whether the tokens of the prompt are to be scored."""
        echoed = self.echo and self.legacy_logprobs is not None
        return self.prompt_logprobs is not None or echoed or self.input_logprobs


PLAIN_CHAT = ScoreAsk()


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A valid request for answers: a chat, or a text to continue.

    `text` is the last user message (text parts joined); `body_sha256` is over the body with sorted
    keys and without `stream`/`stream_options`.
    """

    model: str
    text: str
    n: int
    temperature: float
    seed: int | None
    top_p: float
    max_tokens: int | None
    stop: tuple[str, ...]
    logprobs: bool
    top_logprobs: int
    stream: bool
    include_usage: bool
    prompt_tokens: int
    body_sha256: bytes
    prompt_sha256: bytes
    messages: tuple[tuple[str, str], ...]
    scoring: ScoreAsk = PLAIN_CHAT


def _invalid(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    return Refusal(400, error_body(message, "invalid_request_error", code, param))


def context_exceeded(context_tokens: int, requested: int) -> Refusal:
    """Return the refusal (400) of a request that exceeds the context."""
    return _invalid(
        f"This model's maximum context length is {context_tokens} tokens. However, you requested "
        f"{requested} tokens.",
        "messages",
        "context_length_exceeded",
    )


def read_body_object(raw: bytes) -> dict[str, Any]:
    """Parse a request body.

    Raises:
        Refusal: 400, no JSON object.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _invalid("We could not parse the JSON body of your request.") from error
    if not isinstance(body, dict):
        raise _invalid("The body of the request must be a JSON object.")
    return body


def read_ask(raw: bytes, *, model: str, context_tokens: int) -> ChatRequest:
    """Parse the body of a chat request.

    Raises:
        Refusal: 400 for broken JSON, wrong values or a prompt over the context; 404 for another model.
    """
    body = read_body_object(raw)
    scoring = PLAIN_CHAT
    if body.keys() & _CHAT_SCORING:
        scoring = ScoreAsk(
            prompt_logprobs=_integer(body, "prompt_logprobs", 0, MAX_TOP_LOGPROBS),
            opens_answer=body.get("add_generation_prompt", True) is True,
            continues=body.get("continue_final_message") is True,
        )
    return ask_of(body, model=model, context_tokens=context_tokens, scoring=scoring)


def read_text_ask(raw: bytes, route: str, *, model: str, context_tokens: int) -> ChatRequest:
    """Parse the body of a request to continue a text: `/v1/completions`, or SGLang's `/generate`.

    Raises:
        Refusal: as `read_ask`.
    """
    body = read_body_object(raw)
    text = body.get("prompt" if route == "completions" else "text")
    if not isinstance(text, str) or not text:
        raise _invalid("The prompt must be a text that is not empty.", "prompt")
    chat = {name: value for name, value in body.items() if name not in ("prompt", "text", "logprobs", "echo")}
    if route == "completions":
        listed = _integer(body, "logprobs", 0, MAX_TOP_LOGPROBS)
        scoring = ScoreAsk(
            route=route,
            text=text,
            echo=_boolean(body, "echo"),
            prompt_logprobs=_integer(body, "prompt_logprobs", 0, MAX_TOP_LOGPROBS),
            legacy_logprobs=listed,
            special=body.get("add_special_tokens", True) is True,
        )
    else:
        listed = None
        wants = _boolean(body, "return_logprob") and body.get("logprob_start_len") == 0
        top = _integer(body, "top_logprobs_num", 0, MAX_TOP_LOGPROBS) or 0
        scoring = ScoreAsk(route=route, text=text, input_logprobs=wants, input_top=top)
        sampling = body.get("sampling_params") or {}
        chat |= {"model": model, "max_tokens": sampling.get("max_new_tokens")}
    if chat.get("max_tokens") == 0:  # vLLM generates a token then too, and leaves it out
        chat["max_tokens"] = 1
    if listed is not None:
        chat |= {"logprobs": True, "top_logprobs": listed}
    chat["messages"] = [{"role": "user", "content": text}]
    return ask_of(chat, model=model, context_tokens=context_tokens, scoring=scoring)


def ask_of(body: dict[str, Any], *, model: str, context_tokens: int, scoring: ScoreAsk) -> ChatRequest:
    """Return the request that a body in the form of a chat's makes.

    Raises:
        Refusal: as `read_ask`.
    """
    asked_model = body.get("model")
    if not isinstance(asked_model, str):
        raise _invalid("you must provide a model parameter", "model")
    if asked_model != model:
        text = f"The model `{asked_model}` does not exist or you do not have access to it."
        raise Refusal(404, error_body(text, "invalid_request_error", "model_not_found", "model"))
    messages = _read_messages(body.get("messages"))
    text = next((content for role, content in reversed(messages) if role == "user"), "")
    prompt_tokens = sum(tokens.count(content) + tokens.TOKENS_PER_MESSAGE for _, content in messages)
    max_tokens = _read_max_tokens(body)
    if prompt_tokens + (max_tokens or 0) > context_tokens:
        raise context_exceeded(context_tokens, prompt_tokens + (max_tokens or 0))
    logprobs, top = _read_logprobs(body)
    stream = _boolean(body, "stream")
    options = body.get("stream_options")
    for field in _TRANSPORT_ONLY:
        body.pop(field, None)
    return ChatRequest(
        model=asked_model,
        text=text,
        n=_integer(body, "n", 1, MAX_CHOICES) or 1,
        temperature=_number(body, "temperature", 0, 2, 1.0),
        seed=_integer(body, "seed", -(2**63), 2**63 - 1),
        top_p=_number(body, "top_p", 0, 1, 1.0),
        max_tokens=max_tokens,
        stop=_read_stop(body.get("stop")),
        logprobs=logprobs,
        top_logprobs=top,
        stream=stream,
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        prompt_tokens=prompt_tokens,
        body_sha256=hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).digest(),
        prompt_sha256=hashlib.sha256(text.encode()).digest(),
        messages=messages,
        scoring=scoring,
    )


def limit_choices(ask: ChatRequest, most: int, n_above: str) -> ChatRequest:
    """Return the request with at most this many choices, if `n_above` is `fewer`.

    Raises:
        Refusal: it asks for more, and `n_above` is `refuse`.
    """
    if ask.n <= most:
        return ask
    if n_above == "fewer":
        return replace(ask, n=most)
    text = f"Invalid 'n': integer above maximum value. Expected a value <= {most}, but got {ask.n} instead."
    raise _invalid(text, "n", "integer_above_max_value")


def _read_messages(messages: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise _invalid("Invalid 'messages': expected a non-empty array.", "messages")
    pairs = []
    for at, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _invalid(f"Invalid 'messages[{at}]': expected an object with a role.", f"messages[{at}]")
        pairs.append((message["role"], _message_text(message.get("content"), at)))
    return tuple(pairs)


def _message_text(content: Any, at: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(part for part in parts if isinstance(part, str))
    raise _invalid(f"Invalid 'messages[{at}].content'.", f"messages[{at}].content")


def _read_max_tokens(body: dict[str, Any]) -> int | None:
    newer = _integer(body, "max_completion_tokens", 1, 2**31)
    older = _integer(body, "max_tokens", 1, 2**31)
    return older if newer is None else newer


def _read_logprobs(body: dict[str, Any]) -> tuple[bool, int]:
    wanted = _boolean(body, "logprobs")
    top = _integer(body, "top_logprobs", 0, MAX_TOP_LOGPROBS) or 0
    if top and not wanted:
        raise _invalid("'logprobs' must be true when 'top_logprobs' is set.", "top_logprobs")
    return wanted, top


def _read_stop(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(word, str) for word in stops):
        raise _invalid("Invalid 'stop': expected up to 4 strings.", "stop")
    return tuple(word for word in stops if word)


def _boolean(body: dict[str, Any], field: str) -> bool:
    value = body.get(field)
    if value is not None and not isinstance(value, bool):
        raise _invalid(f"Invalid type for '{field}': expected a boolean.", field)
    return bool(value)


def _integer(body: dict[str, Any], field: str, low: int, high: int) -> int | None:
    value = body.get(field)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _invalid(f"Invalid value for '{field}': expected an integer from {low} to {high}.", field)
    return value


def _number(body: dict[str, Any], field: str, low: float, high: float, default: float) -> float:
    value = body.get(field)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise _invalid(f"Invalid value for '{field}': expected a number from {low} to {high}.", field)
    return float(value)
