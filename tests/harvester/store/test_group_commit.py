"""Test the writer thread: acknowledged means durable, order is kept, a fault reaches every caller."""

from __future__ import annotations

import threading

import pytest

from harvester.errors import StoreError, StoreFull
from harvester.store.journal.group_commit import GroupCommit
from harvester.store.journal.journal import Journal
from tests.harvester.store_rows import answer, intent, key_of, open_store


class Heard:
    """Collects acknowledgements from the writer thread."""

    def __init__(self, expected: int) -> None:
        self.news: list[BaseException | None] = []
        self._left = expected
        self._all = threading.Event()

    def __call__(self, error: BaseException | None) -> None:
        self.news.append(error)
        if len(self.news) == self._left:
            self._all.set()

    def wait(self) -> list[BaseException | None]:
        assert self._all.wait(240)
        return self.news


def test_acknowledged_records_are_seen_by_another_connection(tmp_path):
    writer = GroupCommit(open_store(tmp_path))
    heard = Heard(500)
    for number in range(500):
        writer.submit(answer(number), heard)
    assert set(heard.wait()) == {None}
    with Journal.open(tmp_path, read_only=True) as reader:  # the writer is still open
        assert len(reader.look_up([key_of(n) for n in range(500)])) == 500
    writer.close()


def test_what_is_queued_shares_transactions(tmp_path):
    journal = open_store(tmp_path)
    sizes: list[int] = []
    apply = journal.apply
    journal.apply = lambda records: (sizes.append(len(records)), apply(records))[1]
    writer = GroupCommit(journal, max_records=64, max_wait_s=0.05)
    entered, gate = threading.Event(), threading.Event()
    writer.call(lambda _: (entered.set(), gate.wait(240)))
    assert entered.wait(240)  # else the thread could take the first records together with this call
    heard = Heard(300)
    for number in range(300):
        writer.submit(intent(number), heard)
    gate.set()
    heard.wait()
    writer.close()
    assert sum(sizes) == 300
    assert max(sizes) == 64
    assert len(sizes) == 5


def test_a_call_sees_all_that_was_submitted_before_it_and_nothing_after(tmp_path):
    writer = GroupCommit(open_store(tmp_path))
    heard = Heard(30)
    counts = []
    for number in range(30):
        writer.submit(answer(number), heard)
        counts.append(writer.call(lambda journal: journal.totals().answers))
    assert [future.result(20) for future in counts] == list(range(1, 31))
    writer.close()


def test_closing_commits_what_is_queued_and_refuses_the_rest(tmp_path):
    writer = GroupCommit(open_store(tmp_path), max_wait_s=5)
    heard = Heard(20)
    for number in range(20):
        writer.submit(answer(number), heard)
    writer.close()
    writer.close()
    assert heard.wait() == [None] * 20
    with pytest.raises(StoreError, match="closed"):
        writer.submit(answer(99), heard)
    with pytest.raises(StoreError, match="closed"):
        writer.call(lambda journal: journal.totals())
    with Journal.open(tmp_path) as journal:
        assert journal.totals().answers == 20


def test_a_fault_reaches_the_batch_and_all_that_follows(tmp_path):
    journal = open_store(tmp_path)
    with journal.reading() as connection:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count={pages + 1}")
    writer = GroupCommit(journal)
    heard = Heard(400)
    for number in range(400):
        writer.submit(answer(number), heard)
    news = heard.wait()
    late = Heard(1)
    writer.submit(intent(1), late)
    (error,) = late.wait()
    assert isinstance(error, StoreFull)
    stored = writer.call(lambda journal: len(journal.look_up([key_of(n) for n in range(400)]))).result(20)
    assert stored == news.count(None)  # what was acknowledged is there, what was not is not
    assert isinstance(news[-1], StoreFull)
    writer.close()


def test_one_record_that_can_not_be_written_does_not_harm_its_neighbours(tmp_path):
    writer = GroupCommit(open_store(tmp_path), max_wait_s=0.05)
    gate = threading.Event()
    writer.call(lambda _: gate.wait(240))
    good, bad = Heard(2), Heard(1)
    writer.submit(answer(0), good)
    writer.submit(answer(1, body={"messages": object()}), bad)
    writer.submit(answer(2), good)
    gate.set()
    assert good.wait() == [None, None]
    assert isinstance(bad.wait()[0], TypeError)
    assert writer.call(lambda journal: journal.totals().answers).result(20) == 2
    writer.close()


def test_an_error_in_a_call_is_the_callers(tmp_path):
    writer = GroupCommit(open_store(tmp_path))
    with pytest.raises(ZeroDivisionError):
        writer.call(lambda _: 1 // 0).result(20)
    assert writer.call(lambda journal: journal.totals().answers).result(20) == 0
    writer.close()
