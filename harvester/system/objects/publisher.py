"""Publish objects to a location: upload what is missing, verify it, write the manifest last.

A kill at any point leaves what was published before, and objects that no manifest names; the next publication
goes on with them. Objects that the manifest there names are never replaced silently: one that is missing or
has changed is a finding. Nothing is deleted but, on request, objects that an earlier manifest named and that
are superseded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from harvester.errors import ConfigError, FindingsError, StoreCorrupt
from harvester.system.counted import first_few
from harvester.system.failpoints import reach
from harvester.system.objects.location import Location, translating
from harvester.system.objects.publication import Publication
from harvester.system.objects.transfer import (
    ObjectContent,
    Seen,
    listing,
    read_publication,
    sha256_there,
    upload,
    write_publication,
)
from harvester.system.objects.verified import VerifiedObjects

# Where the objects of publications lie; nothing else is ever deleted.
OBJECT_FOLDERS = ("shards/", "asks/", "papers/", "versions/")
# Objects that are transferred at a time.
WORKERS = 4


@dataclass(frozen=True, slots=True)
class Published:
    """What a publication did.

    Attributes:
        uploaded, uploaded_bytes: objects written now. verified: objects read back without being written.
        objects, size_bytes: all that the manifest names.
        superseded: objects there that an earlier manifest named and this one does not.
        deleted: those of them that were deleted.
        is_new: whether the manifest was written.
    """

    url: str
    uploaded: int
    uploaded_bytes: int
    verified: int
    objects: int
    size_bytes: int
    superseded: tuple[str, ...]
    deleted: int
    is_new: bool


@dataclass(frozen=True, slots=True)
class PublishOptions:
    """How something is published.

    Attributes:
        repair: upload objects again that changed or are missing there, instead of naming them.
        verify: read all objects back, also those that have not been written since they were.
        replace: let the manifest take the place of that of another corpus or folder.
        prune: delete superseded objects.
        workers: objects transferred at a time.
    """

    repair: bool = False
    verify: bool = False
    replace: bool = False
    prune: bool = False
    workers: int = WORKERS


def earlier_publication(location: Location, options: PublishOptions) -> Publication | None:
    """Return the manifest that is there; None for none, and with `repair` also for one that is damaged.

    Raises:
        StoreCorrupt, StoreFormatError: it can't be used. RemoteStoreError: the storage refuses.
    """
    try:
        return read_publication(location, absent_is_none=True)
    except StoreCorrupt:
        if not options.repair:
            raise
        return None


def publish(
    location: Location,
    publication: Publication,
    sources: Iterable[ObjectContent],
    before: Publication | None,
    options: PublishOptions,
    note: Callable[[str], None] = lambda _: None,
) -> Published:
    """Upload what is missing and write the manifest.

    Args:
        publication: what is to be there.
        sources: contents of its objects, by any order; all of them but those that `before` names too.
        before: the manifest that is there, as `read_publication` gave it.
        note: is called with a line for each object that was uploaded.

    Raises:
        FindingsError: exit 1; objects that the manifest there names are missing or changed. New objects were
            uploaded, the manifest was not written.
        ConfigError: something else was published there.
        RemoteStoreError: the storage can't be reached, or refuses. StoreCorrupt: a file here changed.
    """
    if before is not None:
        _require_same(location, before, publication, options)
    by_name = {source.object.name: source for source in sources}
    run = _Transfer(location, options, before, note)
    run.transfer([by_name.get(each.name, ObjectContent(each)) for each in publication.objects], set(by_name))
    reach("publish.before_manifest")
    # Another publication may have written its manifest since `before` was read.
    now = earlier_publication(location, options)
    if now is not None:
        _require_expected(location, before, now, publication, options)
    is_new = now is None or not now.same_content(publication)
    superseded = _superseded(now, publication, run.seen)
    if is_new:
        write_publication(
            location,
            publication.model_copy(update={"superseded": superseded}),
            lambda there: _require_expected(location, before, there, publication, options),
            is_first=now is None,
        )
        reach("publish.after_manifest")
    deleted = 0
    if options.prune:
        for name in superseded:
            with translating(f"{location.url}/{name}"):
                location.filesystem.delete_file(location.path(name))
            deleted += 1
    return Published(
        location.url,
        run.uploaded,
        run.uploaded_bytes,
        run.verified,
        len(publication.objects),
        publication.size_bytes,
        superseded,
        deleted,
        is_new,
    )


class _Transfer:
    """One publication: compares what is there with what is to be there, and uploads the difference."""

    def __init__(
        self,
        location: Location,
        options: PublishOptions,
        before: Publication | None,
        note: Callable[[str], None],
    ) -> None:
        self._location, self._options, self._note = location, options, note
        self._named = {} if before is None else {each.name: each for each in before.objects}
        self._memory = VerifiedObjects(location.url)
        self.seen: Mapping[str, Seen] = listing(location)
        self.uploaded = self.uploaded_bytes = self.verified = 0

    def transfer(self, sources: Sequence[ObjectContent], here: set[str]) -> None:
        """Bring all objects there.

        Args:
            here: names of the objects whose content is at hand; others can only be verified.

        Raises:
            FindingsError: objects are missing or changed.
        """
        findings: list[str] = []
        try:
            with ThreadPoolExecutor(self._options.workers, "publish") as pool:
                futures = [pool.submit(self._bring, source, source.object.name in here) for source in sources]
                try:
                    findings = [finding for future in futures if (finding := future.result())]
                except BaseException:
                    for future in futures:
                        future.cancel()
                    raise
        finally:
            self._memory.save(frozenset(source.object.name for source in sources))
        if findings:
            raise FindingsError(
                f"{len(findings)} published objects are not what was published: {first_few(findings)}",
                place=self._location.url,
                remedy="find out who changed them; `--repair` uploads them again. The manifest there was not "
                "replaced",
            )

    def _bring(self, source: ObjectContent, is_here: bool) -> str:
        """Bring one object there, or verify it; return what is wrong with it, "" for nothing."""
        published, seen = source.object, self.seen.get(source.object.name)
        named = self._named.get(published.name)
        if seen is not None and seen.size_bytes == published.size_bytes:
            if self._memory.holds(published, seen) and not self._options.verify:
                return ""
            if sha256_there(self._location, published.name) == (published.sha256, published.size_bytes):
                self.verified += 1
                self._memory.add(published, seen)
                return ""
        if named is not None and not (self._options.repair and is_here):
            return f"{published.name} is missing" if seen is None else f"{published.name} has changed"
        written = upload(self._location, source)
        self._memory.add(published, written)
        self.uploaded += 1
        self.uploaded_bytes += published.size_bytes
        self._note(f"uploaded {published.name} ({published.size_bytes:,} bytes)")
        reach("publish.after_object")
        return ""


def _superseded(
    before: Publication | None, publication: Publication, seen: Mapping[str, Seen]
) -> tuple[str, ...]:
    if before is None:
        return ()
    kept = {each.name for each in publication.objects}
    earlier = {*before.superseded, *(each.name for each in before.objects)}
    return tuple(sorted(name for name in earlier - kept if name in seen and name.startswith(OBJECT_FOLDERS)))


def _require_expected(
    location: Location,
    before: Publication | None,
    now: Publication,
    publication: Publication,
    options: PublishOptions,
) -> None:
    """Refuse to take the place of what another publication wrote since `before` was read.

    A later manifest of the same store may be replaced. Corpora and folders tell by nothing but their name
    that they are the same, so another content of them may not.

    Raises:
        ConfigError: something else is there.
    """
    if before is not None and now.same_content(before):
        return
    _require_same(location, now, publication, options)
    if now.kind != "store" and not options.replace and not now.same_content(publication):
        raise ConfigError(
            f"another {now.kind} {now.name!r} was published there at the same time",
            place=location.url,
            remedy="publish again to take its place, or name another URL",
        )


def _require_same(
    location: Location, before: Publication, publication: Publication, options: PublishOptions
) -> None:
    """Refuse to take the place of something else.

    A store may replace what it grew from: every run that is published must be known to it.

    Raises:
        ConfigError: something else is there.
    """
    if options.replace or before.source_sha256 == publication.source_sha256:
        return
    remedy = "name another URL, or `--replace` it; its objects stay"
    if before.kind != publication.kind or (before.kind != "store" and before.name != publication.name):
        raise ConfigError(
            f"holds the {before.kind} {before.name!r}, not the {publication.kind} {publication.name!r}",
            place=location.url,
            remedy=remedy,
        )
    unknown = {run.run_id for run in before.runs} - {run.run_id for run in publication.runs}
    if unknown:
        raise ConfigError(
            f"holds another store: this one does not know {len(unknown)} of its runs, such as {min(unknown)}",
            place=location.url,
            remedy=remedy,
        )
