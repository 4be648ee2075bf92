"""Test the filters on texts, formats, samples and private data, and what a curation does with all of them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from harvester.errors import ConfigError
from harvester.export import curate, curation_page, filters, stratified
from harvester.export.cards.curation import curation_lines
from harvester.export.drops import Drop, Filter, Survey
from harvester.export.masking import PII, SECRETS, mask
from harvester.export.text_filters import repeated_share
from harvester.quality.verifiers.settings import VerifierSection
from harvester.quality.verifiers.verifiers import Verifiers
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from tests.commands import run as run_command
from tests.trainer import tiny

LOOP = "I went to the market and bought some bread for the long evening. " * 6
PROSE = (
    "The sky is blue since air scatters short waves of light more than long ones. At sunset light has a "
    "longer way through the air, most of the blue is gone by then; what reaches the eye is red and orange."
)


def sample(completion: str = "4", prompt: str = "2+2?", **more: Any) -> Sample:
    facts: dict[str, Any] = {
        "key": "0" * 64,
        "prompt_id": "p",
        "messages": [{"role": "user", "content": prompt}],
        "completion": completion,
        "outcome": "ok",
        "finish_reason": "stop",
        **more,
    }
    return Sample(**facts)


def reason(check: Filter, row: Sample) -> str:
    result = check(row)
    return result.reason if isinstance(result, Drop) else ""


@pytest.mark.parametrize(
    ("name", "value", "row", "expected"),
    [
        ("tokens", {"least": 3, "most": 9}, sample(output_tokens=2), "too_few_tokens"),
        ("tokens", {"least": 3, "most": 9}, sample(output_tokens=9), ""),
        ("tokens", 9, sample(output_tokens=10), "too_many_tokens"),
        ("repetition", None, sample(LOOP), "repetitive"),
        ("repetition", None, sample(PROSE), ""),
        ("repetition", 0.1, sample("重复的句子在这里一次又一次地出现。" * 5), "repetitive"),
        ("finished_reasoning", None, sample("<think>so far and no"), "reasoning_cut"),
        ("finished_reasoning", None, sample("<think>so</think>\n4"), ""),
        ("finished_reasoning", None, sample("<think>so</think> \n"), "reasoning_cut"),
        ("finished_reasoning", None, sample("", reasoning="hm"), "reasoning_cut"),
        ("json_schema", {"type": "object", "required": ["a"]}, sample('{"a": 1}'), ""),
        ("json_schema", {"type": "object", "required": ["a"]}, sample('{"b": 1}'), "schema_mismatch"),
        ("json_schema", {"type": "object"}, sample("no"), "no_json"),
        ("pattern", "answer: \\d+", sample("answer: 4"), ""),
        ("pattern", "answer: \\d+", sample("4"), "pattern_missing"),
        ("no_pattern", "(?i)lorem ipsum", sample("Lorem ipsum dolor"), "pattern_found"),
        ("code", "python", sample("So:\n```python\nprint(4)\n```\n"), ""),
        ("code", "python", sample("So:\n```py\nprint(4\n```\n"), "code_does_not_parse"),
        ("code", "python", sample("```js\nlet a = (\n```"), ""),
        ("code", "json", sample('{"a": }'), "code_does_not_parse"),
        ("pii", None, sample("write to ann.lee@example.org"), "pii"),
        ("pii", None, sample("4", "my card is 4111 1111 1111 1111"), "pii"),
        ("pii", None, sample("the number 4111 1111 1111 1112"), ""),
        ("secrets", None, sample("key = AKIAABCDEFGHIJKLMNOP"), "secrets"),
        ("secrets", None, sample("password is a word, and so is secret: none of them is here"), ""),
    ],
)
def test_what_a_filter_drops(name: str, value: object, row: Sample, expected: str) -> None:
    assert reason(filters.named(name, value), row) == expected


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I cannot assist.",
        "As an AI language model, I do not have opinions.",
        "Es tut mir leid, dabei kann ich nicht helfen.",
        "Je suis désolé, mais je ne peux pas vous aider.",
        "Lo siento, no puedo ayudar con eso.",
        "Mi dispiace, non posso aiutarti.",
        "Desculpe, não posso ajudar com isso.",
        "К сожалению, я не могу помочь с этим.",
        "很抱歉，我无法提供这方面的帮助。",
        "申し訳ありませんが、お答えできません。",
        "죄송하지만 도와드릴 수 없습니다.",
        "عذرا، لا أستطيع مساعدتك في ذلك.",
        "Üzgünüm, bu konuda yardımcı olamam.",
    ],
)
def test_refusals_are_known_in_many_languages(text: str) -> None:
    assert reason(filters.named("no_refusals"), sample(text)) == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "The character says that he can't find the key.",
        "No puedo más que reír con este chiste: un pato entra en un bar.",
        "Die Antwort ist 4.",
        "天空是蓝色的，因为空气散射短波光。",
        f"{PROSE} {PROSE} I'm sorry, I can't say more.",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert reason(filters.named("no_refusals"), sample(text)) == ""


def test_the_language_of_an_answer() -> None:
    check = filters.named("language", ["EN", "de"])
    german = "Der Himmel ist blau, weil die Luft kurzwelliges Licht stärker streut als langwelliges."
    french = "Le ciel est bleu parce que l'air diffuse davantage les courtes longueurs d'onde de la lumière."
    assert [reason(check, sample(text)) for text in (PROSE, german, french, "oui")] == [
        "",
        "",
        "other_language",
        "",
    ]


def test_repeated_shares() -> None:
    assert repeated_share("") == 0.0
    assert repeated_share(PROSE) == 0.0
    assert repeated_share("a b c d e f g h " * 2) == pytest.approx(0.5)
    assert repeated_share("very " * 100) > 0.9


def test_masked_rows_keep_their_form_and_lose_what_shows_the_original() -> None:
    secret = 'api_key = "abcdefgh12345678"'
    row = sample(
        f"Use {secret} and ann@example.org",
        "I am bob@example.org",
        metadata_json=json.dumps({"contact": "carl@example.org", "n": 1}),
        request_json=json.dumps(
            {"messages": [{"role": "user", "content": f"I am bob@example.org {secret}"}]}
        ),
        raw=b"bob@example.org",
        logprobs=[],
    )
    masked = filters.chain([filters.named("pii", "mask"), filters.named("secrets", "mask")])(row)
    assert isinstance(masked, Sample)
    assert masked.completion == "Use [PASSWORD] and [EMAIL]"
    assert masked.messages[0]["content"] == "I am [EMAIL]"
    assert masked.metadata == {"contact": "[EMAIL]", "n": 1}
    assert json.loads(masked.request_json)["messages"][0]["content"] == "I am [EMAIL] [PASSWORD]"
    assert (masked.raw, masked.logprobs) == (b"", None)
    assert filters.named("pii", "mask")(sample("nothing private")) is None


@pytest.mark.parametrize(
    ("kind", "text", "is_found"),
    [
        ("iban", "DE89 3704 0044 0532 0130 00", True),
        ("iban", "DE89 3704 0044 0532 0130 01", False),
        ("phone", "call +49 170 1234567 now", True),
        ("phone", "the sum 49 170 1234567", False),
        ("us_ssn", "078-05-1120", True),
        ("private_key", "-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY-----", True),
        ("github_token", f"ghp_{'a1' * 18}", True),
        ("api_key", "sk-proj-abcdefghijklmnopqrst1234", True),
        ("api_key", "a sk-learn pipeline", False),
        ("card", "4111111111111111 is a card", True),
        ("card", "id,card\n7,4111111111111111", True),
        ("card", "0.4111111111111111", False),
        ("card", "x = .4111111111111111", False),
        ("card", ".4111111111111111", False),
        ("card", "1234111111111111111412341234.5", False),
        ("card", "4111111111111111.25", False),
        ("phone", "x = +0.123456789", False),
        ("password", "password: hunter2hunter2", True),
        ("password", "DB_PASSWORD=hunter2hunter2.", True),
        ("password", '{"pwd": "hunter2hunter2"}', True),
        ("password", "token = correct-hor$e-battery", True),
        ("password", 'secret = "correcthorse"', True),
        ("password", "password: please choose", False),
        ("password", "password: something that you remember", False),
        ("password", "password: 8-character minimum", False),
        ("password", "password:\nExample12 comes next", False),
        ("password", "token = tokens[0].strip()", False),
        ("password", '{"token": "international"}', False),
        ("password", "max_tokens: 1024 or token: 12345678", False),
        ("jwt", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijk", True),
    ],
)
def test_private_forms(kind: str, text: str, is_found: bool) -> None:
    assert (f"[{kind.upper()}]" in mask(text, {**PII, **SECRETS})) == is_found


def surveyed(check: Filter, rows: list[Sample]) -> list[str]:
    assert isinstance(check, Survey)
    for row in rows:
        check.observe(row)
    return [reason(check, row) for row in rows]


def test_agreement_and_difficulty_look_at_all_answers_of_a_prompt() -> None:
    answers = {"a": ["4", "4", " 4", "5"], "b": ["1"], "c": ["4", "4"], "d": ["5", "6"]}
    rows = [
        sample(text, prompt_id=prompt, sample_index=number, reference="4")
        for prompt, texts in answers.items()
        for number, text in enumerate(texts)
    ]
    assert surveyed(filters.named("agreement", 0.6), rows) == [
        *("", "", "", "disagrees"),
        "",
        *("", ""),
        *("disagrees", "disagrees"),
    ]
    verifiers = Verifiers({"*": VerifierSection(kind="exact")}, Path())
    limits = filters.named("difficulty", {"least": 0.1, "most": 0.9}, verifiers)
    assert surveyed(limits, rows) == [*[""] * 4, "too_hard", *["too_easy"] * 2, *["too_hard"] * 2]


def test_rows_are_dealt_out_by_weight() -> None:
    assert stratified.deal({"a": 1, "b": 1}, {"a": 100, "b": 100}, 10) == {"a": 5, "b": 5}
    assert stratified.deal({"a": 3, "b": 1}, {"a": 100, "b": 100}, 10) == {"a": 8, "b": 2}
    assert stratified.deal({"a": 1, "b": 1}, {"a": 2, "b": 100}, 10) == {"a": 2, "b": 8}
    assert stratified.deal({"a": 1, "b": 0}, {"a": 2, "b": 100}, 10) == {"a": 2, "b": 0}
    rows = [sample(prompt_id=f"p{n}", tags=["x" if n % 4 else "y"]) for n in range(200)]
    small, large = (
        stratified.draw(rows, stratified.SampleSection(rows=count, by="tag")) for count in (20, 60)
    )
    assert (len(small.rows), len(large.rows)) == (20, 60)
    assert small.rows < large.rows
    assert small.warnings == large.warnings == ()
    drawn = Counter(row.tags[0] for row in rows if stratified.identity(row) in small.rows)
    assert drawn == {"x": 10, "y": 10}


OWN = """
from harvester import Drop

def short_words(sample):
    longest = max(map(len, (sample.completion or "").split()), default=0)
    return Drop("long_word", f"{longest} letters") if longest > 20 else None

def broken(sample):
    return longest
"""


def curate_toml(folder: Path, text: str) -> Path:
    rows = [
        tiny.sample(n, f"Prompt {n}", answer, tags=["even" if n % 2 == 0 else "odd"])
        for n, answer in enumerate(ANSWERS)
    ]
    tiny.corpus(folder / "store", rows)
    (folder / "mine.py").write_text(OWN)
    (folder / "curate.toml").write_text(f'corpus = "store"\nout = "out"\n{text}')
    return folder / "curate.toml"


ANSWERS = [
    PROSE,
    LOOP,
    "I'm sorry, but I can't help with that.",
    "mail ann@example.org",
    "a pneumonoultramicroscopicsilicovolcanoconiosis",
    "four",
]


def test_a_curation_tallies_shows_examples_and_what_each_filter_would_do(tmp_path: Path) -> None:
    path = curate_toml(
        tmp_path,
        'filters = ["finished", "no_refusals", "repetition", {pii = "mask"}, {python = "mine:short_words"}, '
        "{longest = 60}]\n",
    )
    done = run_command("harvester", ["curate", path, "--page", tmp_path / "page.html", "--json"], timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["dropped"] == {"long_word": 1, "refusal": 1, "repetitive": 1, "too_long": 1}
    assert (result["kept"], result["masked"]) == (2, 1)
    assert result["examples"]["long_word"][0]["detail"] == "45 letters"
    assert result["alone"]["longest"] == {"alone": 2, "no_other": 1}
    assert result["alone"]["repetition"] == {"alone": 1}
    assert result["alone"]["pii"] == {"masks": 1}
    kept = {row.completion for row in Corpus.open(tmp_path / "out").samples()}
    assert kept == {"mail [EMAIL]", "four"}
    page = (tmp_path / "page.html").read_text()
    assert "What each filter would drop by itself" in page
    assert "pneumonoultra" in page
    assert "Private data is hidden in the examples" in page
    assert "1 of the rows that were kept had private data masked" in "".join(curation_lines(tmp_path / "out"))
    assert "<script" not in page
    record = json.loads((tmp_path / "out" / "curation.json").read_text())
    assert record["examples_note"].startswith("Private data is hidden")
    assert record["filters"][-2:] == ["python", "longest"]
    assert record["examples"]["refusal"][0]["answer"].startswith("I'm sorry")


def test_examples_of_private_rows_are_masked(tmp_path: Path) -> None:
    counts = curate.curate(curate.load(curate_toml(tmp_path, 'filters = ["pii"]\n')))
    assert counts.dropped == {"pii": 1}
    assert counts.examples["pii"][0]["answer"] == "mail [EMAIL]"
    assert "ann@example.org" not in (tmp_path / "out" / "curation.json").read_text()


def test_a_page_replaces_no_file_but_an_earlier_page(tmp_path: Path) -> None:
    path = tmp_path / "prompts.html"
    path.write_text('{"prompt": "mine"}\n')
    with pytest.raises(ConfigError, match="no page of an earlier curation"):
        curation_page.check_target(path)
    with pytest.raises(ConfigError, match=r"NAME\.html"):
        curation_page.check_target(tmp_path / "p.jsonl")
    config = curate.load(curate_toml(tmp_path, ""))
    curation_page.check_target(tmp_path / "page.html")
    (tmp_path / "page.html").write_text(curation_page.render(config, curate.curate(config)))
    curation_page.check_target(tmp_path / "page.html")


def test_the_command_refuses_the_path_of_a_page_before_it_curates(tmp_path: Path) -> None:
    path = curate_toml(tmp_path, "")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "mine"}\n')
    done = run_command("harvester", ["curate", path, "--page", prompts], timeout=240)
    assert done.returncode == 2
    assert "NAME.html" in done.stderr
    assert prompts.read_text() == '{"prompt": "mine"}\n'
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ('[sample]\nrows = 2\nby = "tag"\nweights = {nope = 3}', "group 'nope'; groups: 'even', 'odd'"),
        ('[sample]\nrows = 2\nby = "metadata.nofield"', "'metadata.nofield': no kept row has it"),
        ("[sample]\nrows = 9", "rows = 9: only 6 rows were drawn; the filters keep no more"),
        ('[sample]\nrows = 9\nby = "tag"\nweights = {odd = 0}', "only 3 rows .* a weight above 0"),
        ('filters = [{run = ["nonexistent"]}]', "no run 'nonexistent' is in"),
    ],
)
def test_settings_that_fit_no_row_are_warned_of(tmp_path: Path, text: str, warning: str) -> None:
    counts = curate.curate(curate.load(curate_toml(tmp_path, text)))
    assert len(counts.warnings) == 1
    assert re.search(warning, counts.warnings[0])


def test_no_corpus_is_written_inside_the_one_that_is_read(tmp_path: Path) -> None:
    path = curate_toml(tmp_path, "")
    path.write_text('corpus = "store"\nout = "store/sub"\n')
    with pytest.raises(ConfigError, match="inside the corpus"):
        curate.curate(curate.load(path))
    assert not (tmp_path / "store" / "sub").exists()


def test_a_sample_is_drawn_from_what_the_filters_keep(tmp_path: Path) -> None:
    path = curate_toml(
        tmp_path, 'filters = ["no_refusals"]\n[sample]\nrows = 3\nby = "tag"\nweights = {odd = 2}\n'
    )
    counts = curate.curate(curate.load(path))
    assert (counts.kept, dict(counts.dropped)) == (3, {"not_drawn": 2, "refusal": 1})
    tags = Counter(row.tags[0] for row in Corpus.open(tmp_path / "out").samples())
    assert tags == {"odd": 2, "even": 1}
    assert not list((tmp_path / "out" / "shards").glob("staged*"))


@pytest.mark.parametrize("seed", range(3))
def test_only_rows_that_are_written_count_as_masked_or_are_shown_as_kept(tmp_path: Path, seed: int) -> None:
    path = curate_toml(tmp_path, f'filters = [{{pii = "mask"}}]\n[sample]\nrows = 2\nseed = {seed}\n')
    counts = curate.curate(curate.load(path))
    written = list(Corpus.open(tmp_path / "out").samples())
    assert counts.kept == len(written) == 2
    assert counts.changed == sum("[EMAIL]" in (row.completion or "") for row in written)
    assert {row["prompt_id"] for row in counts.examples["kept"]} == {row.prompt_id for row in written}
    record = json.loads((tmp_path / "out" / "curation.json").read_text())
    assert record.get("masked", 0) == counts.changed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('filters = [{python = "mine:none"}]', "mine:none can't be imported"),
        ('filters = [{python = "nowhere:f"}]', "nowhere:f can't be imported"),
        ("filters = [{tokens = {lest = 1}}]", "'tokens' needs"),
        ("filters = [{repetition = 2}]", "share from 0 to 1"),
        ("filters = [{language = []}]", "needs codes"),
        ('filters = [{language = "english"}]', "no code of a language that is known: 'english'"),
        ('filters = [{language = ["en", "xx"]}]', "no code of a language that is known: 'xx'"),
        ('filters = [{code = "cobol"}]', "needs one of python"),
        ('filters = [{pii = "hide"}]', "drop"),
        ('filters = [{pattern = "("}]', "'pattern' has no regular expression"),
        ('filters = [{no_pattern = "("}]', "'no_pattern' has no regular expression"),
        ('where = {outcome = "complete"}', "no outcome is called 'complete'"),
        ('where = "task = "', "'where' is no condition"),
        ("filters = [{json_schema = {type = 1}}]", "no JSON Schema"),
        ("filters = [{difficulty = {least = 0.1}}]", r"needs a table \[verify\]"),
        ('[sample]\nrows = 3\nby = "colour"', "groups no rows"),
        ("[sample]\nrows = 0", "must be more than 0"),
        ('where = {modle = "a"}', "did you mean 'model'"),
        ("[decontaminate]\nset = []", "unknown key"),
    ],
)
def test_a_broken_curate_toml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = curate_toml(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        curate.load(path)


def test_errors_of_a_curate_toml_name_where_its_keys_are_listed(tmp_path: Path) -> None:
    path = curate_toml(tmp_path, "filters = [{longest = -5}]")
    done = run_command("harvester", ["curate", path], timeout=240)
    assert done.returncode == 2
    assert "remedy  {longest = 4000}" in done.stderr
    assert f"{path}:3" in done.stderr
    path.write_text('corpus = "store"\nout = "out"\n[sample]\nrows = "many"\n')
    done = run_command("harvester", ["curate", path], timeout=240)
    assert done.returncode == 2
    assert "curate.toml of harvester/CONFIG.md lists all keys" in done.stderr
    assert f"{path}:4" in done.stderr


def test_a_filter_that_raises_is_named(tmp_path: Path) -> None:
    path = curate_toml(tmp_path, 'filters = [{python = "mine:broken"}]')
    with pytest.raises(ConfigError, match="mine:broken raised NameError"):
        curate.curate(curate.load(path))
