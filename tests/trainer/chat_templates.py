"""Chat templates of the shapes that students have, written for these tests, with the tokens they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tests.trainer import tiny

LLAMA3 = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] | trim %}"
    "{% set rest = messages[1:] %}{% else %}{% set told = '' %}{% set rest = messages %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday: "
    "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}\n\n{{ told }}<|eot_id|>"
    "{% for m in rest %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe of use.<|im_end|>\n{% endif %}"
    + tiny.CHATML
)
QWEN3 = (  # reasoning of earlier turns is dropped, the last turn's is kept, an empty block stands for none
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m['content'] %}{% set thought = m['reasoning_content'] or '' %}"
    "{% if m['role'] == 'assistant' and not thought and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TOOLS = (  # ChatML with tool schemas, tool calls and tool results; reasoning of earlier turns is dropped
    "{% if tools %}<|im_start|>system\n{% if messages[0]['role'] == 'system' %}"
    "{{ messages[0]['content'] }}\n{% endif %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}{% if not (tools and loop.first and m['role'] == 'system') %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function']['name'] }} "
    "{% for key, value in c['function']['arguments'].items() %}{{ key }}={{ value }};{% endfor %}</call>"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = (  # today's date, from a clock of the template's host
    "{% macro preamble() %}<|im_start|>system\nToday is {{ strftime_now('%Y-%m-%d') }}.<|im_end|>\n"
    "{% endmacro %}{{ preamble() }}" + tiny.CHATML
)
LLAMA2 = (  # the answer's text stands between spaces
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (  # the system prompt stands before the last question; no generation prompt of its own
    "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}"
    "{% for m in rest %}{% if m['role'] == 'user' %}[INST] "
    "{% if loop.last and told is defined %}{{ told }}\n\n{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """A template, its end of turn, its tokens; `marks` are added tokens that aren't special."""

    template: str
    stop: str
    specials: tuple[str, ...]
    marks: tuple[str, ...] = ()

    def tokenizer(self) -> Any:
        made = tiny.tokenizer(self.template, eos=self.stop, bos_token="<s>", more=self.specials)
        made.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in self.marks])
        return made


SHAPES = {
    "chatml": Shape(tiny.CHATML, "<|im_end|>", ()),
    "llama-3": Shape(LLAMA3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>")),
    "qwen-2.5": Shape(QWEN25, "<|im_end|>", ()),
    "qwen-3": Shape(QWEN3, "<|im_end|>", (), ("<think>", "</think>")),
    "gemma": Shape(GEMMA, "<end_of_turn>", ("<start_of_turn>",)),
    "mistral": Shape(MISTRAL, "</s>", ("[INST]", "[/INST]")),
}


def merging() -> Any:
    """A tokenizer without borders: "assistant:" and what follows merge into one token."""
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocab = {letter: number for number, letter in enumerate(letters)}
    for piece in (": ", ": w", " w", "</s>"):
        vocab[piece] = len(vocab)
    made = Tokenizer(models.BPE(vocab=vocab, merges=[(":", " "), (": ", "w"), (" ", "w")]))
    made.decoder = decoders.Fuse()
    template = "{% for m in messages %}{{ m['role'] }}:{{ ' ' ~ m['content'] }}</s>{% endfor %}"
    return _wrapped(made, template + "{% if add_generation_prompt %}assistant:{% endif %}")


def spaced() -> Any:
    """A SentencePiece-like tokenizer: encoding a text alone puts a space before it."""
    letters = [chr(code) for code in range(33, 127)] + ["\n", "▁", "▁h", "▁w", "</s>"]
    vocab = {letter: number for number, letter in enumerate(letters)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "h"), ("▁", "w")]))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    return _wrapped(made, template + "{% if add_generation_prompt %}assistant:{% endif %}")


def llama2() -> Any:
    """A tokenizer like Llama 2's: it puts a space before each text between special tokens."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters += [chr(code) for code in range(33, 127)] + ["▁", "▁▁", "▁P", "▁o"]
    merges = [("▁", "▁"), ("▁", "P"), ("▁", "o")]
    vocab = {letter: number for number, letter in enumerate(letters)}
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _wrapped(made, LLAMA2)


def _wrapped(made: Tokenizer, template: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")
    fast.chat_template = template
    return fast
