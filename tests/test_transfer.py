"""Fetching over a server that misbehaves, and unpacking archives that do."""

import base64
import hashlib
import io
import json
import os
import random
import tarfile

import loopback
import pytest

from flix_jax.experiments.transfer import FetchError, fetch, sha256_of, unpacked

CONTENT = random.Random(0).randbytes(700_000)


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with loopback.serving() as site:
        site.content["/file"] = CONTENT
        yield site


@pytest.fixture
def get(site, tmp_path):
    """Fetches /file into <tmp_path>/new/file without waiting between attempts."""

    def get(**options):
        fetch(f"{site.url}/file", tmp_path / "new" / "file", pause=0, **options)
        return (tmp_path / "new" / "file").read_bytes()

    return get


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Fetching


def test_a_file_arrives_whole_and_alone(site, get, tmp_path):
    seen = []
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    options = {"size": len(CONTENT), "sha256": sha256}
    assert get(progress=lambda *now: seen.append(now), **options) == CONTENT
    assert names(tmp_path / "new") == ["file"] and sha256_of(tmp_path / "new" / "file") == sha256
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT),) * 2
    assert seen == sorted(seen)


@pytest.mark.parametrize("cuts", [[300_000], [1, 300_000, 17], [0, 0, 0, 5, 0, 0]])
def test_a_broken_transfer_goes_on_where_it_stopped(cuts, site, get):
    site.cuts = list(cuts)
    assert get() == CONTENT
    assert site.sent == len(CONTENT), "no byte was sent twice"
    starts = [sum(cuts[:i]) for i in range(len(cuts) + 1)]
    assert [r for _, r in site.asked] == [f"bytes={s}-" if s else None for s in starts]


def test_a_later_call_goes_on_too(site, get, tmp_path):
    site.cuts = [100_000, 0]
    with pytest.raises(FetchError, match=r"ended after 100,000 of 700,000 bytes \(tried 1 times"):
        get(tries=1)
    assert names(tmp_path / "new") == ["file.part", "file.part.json"]
    with pytest.raises(FetchError, match="100,000 bytes are kept in .*file.part"):
        get(tries=1)
    assert get() == CONTENT and site.sent == len(CONTENT)


@pytest.mark.parametrize("lacking", ["ranges", "tagged"])
def test_without_ranges_or_versions_it_starts_over(lacking, site, get):
    setattr(site, lacking, False)
    site.cuts = [300_000, 200_000]
    assert get() == CONTENT
    assert site.sent == 500_000 + len(CONTENT)


def test_parts_of_two_versions_are_never_joined(site, get):
    site.cuts = [300_000]
    with pytest.raises(FetchError):
        get(tries=1)
    site.content["/file"] = changed = CONTENT[::-1]
    assert get() == changed


def test_a_part_of_unknown_origin_is_not_used(site, get, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file.part").write_bytes(b"something else")
    assert get() == CONTENT
    site.cuts = [300_000]
    (tmp_path / "new" / "file").unlink()
    with pytest.raises(FetchError):
        get(tries=1)
    note = tmp_path / "new" / "file.part.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "url": "http://elsewhere/file"}))
    assert get() == CONTENT and site.asked[-1] == ("/file", None)


def test_a_part_that_is_whole_is_not_fetched_again(site, get, tmp_path):
    site.cuts = [300_000]
    with pytest.raises(FetchError):
        get(tries=1)
    (tmp_path / "new" / "file.part").write_bytes(CONTENT)
    assert get() == CONTENT and len(site.asked) == 1


def test_a_part_longer_than_the_file_is_dropped(site, get, tmp_path):
    site.cuts = [300_000]
    with pytest.raises(FetchError):
        get(tries=1)
    (tmp_path / "new" / "file.part").write_bytes(CONTENT + b"more")
    assert get() == CONTENT


def test_another_range_than_asked_for_is_not_taken(site, get):
    site.cuts = [300_000]
    with pytest.raises(FetchError):
        get(tries=1)
    site.headers["Content-Range"] = f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}"
    assert get() == CONTENT


@pytest.mark.parametrize(
    "options, headers, problem",
    [
        ({"size": 5}, {}, "the server's file has 700,000 bytes, expected 5"),
        ({"sha256": "0" * 64}, {}, "expected 0000"),
        ({}, {"x-goog-hash": "crc32c=AAAAAA==, md5=AAAA"}, "another MD5 than the server announced"),
    ],
)
def test_another_size_or_digest_is_refused_and_not_kept(options, headers, problem, site, get):
    site.headers = headers
    with pytest.raises(FetchError, match=problem):
        get(**options)
    assert len(site.asked) == 1
    site.headers = {}
    assert get() == CONTENT, "and nothing of it is left"
    assert [asked for _, asked in site.asked] == [None, None]


def test_the_md5_that_the_server_announces_may_be_right(site, get):
    md5 = base64.b64encode(hashlib.md5(CONTENT).digest()).decode()
    site.headers, site.cuts = {"x-goog-hash": f"md5={md5}"}, [9]
    assert get() == CONTENT


def test_a_busy_server_is_asked_again_and_a_refusal_is_final(site, get):
    site.status = [503, 429]
    assert get() == CONTENT and len(site.asked) == 3
    site.asked.clear()
    site.status = [503] * 9
    with pytest.raises(FetchError, match=r"answered 503 Service Unavailable \(tried 4 times\)"):
        get()
    site.asked.clear()
    site.status = [404]
    with pytest.raises(FetchError, match="the server answered 404 Not Found$"):
        get()
    assert len(site.asked) == 1


def test_no_connection_is_one_line(site, get, tmp_path):
    site.shutdown()
    site.server_close()
    with pytest.raises(FetchError, match=r"^Connection refused \(tried 2 times\)$"):
        get(tries=2)
    with pytest.raises(FetchError, match="begins with http"):
        fetch("file:///etc/passwd", tmp_path / "x")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_one_line(site, tmp_path, monkeypatch):
    monkeypatch.setattr("flix_jax.experiments.transfer.files.write_json", lambda *_: None)
    (tmp_path / "file.part").symlink_to("/dev/full")
    monkeypatch.setattr("pathlib.Path.write_bytes", lambda *_: None)
    with pytest.raises(FetchError, match="file.part: No space left on device$"):
        fetch(f"{site.url}/file", tmp_path / "file", pause=0)


def test_no_room_is_known_beforehand(get, monkeypatch):
    usage = type("Usage", (), {"free": 5})
    monkeypatch.setattr("flix_jax.experiments.transfer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(FetchError, match="new has room for 5 bytes, 700,000 are to come"):
        get()


# Unpacking


def add(tar, name, content=b"x", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def make_archive(path, *members, mode="w:gz"):
    """Members are (name, content) or (name, content, attributes)."""
    with tarfile.open(path, mode) as tar:
        for name, content, *more in members:
            add(tar, name, content, **(more[0] if more else {}))
    return path


def test_an_archive_is_unpacked_and_its_folder_goes_again(tmp_path):
    path = make_archive(
        tmp_path / "a.tgz",
        ("./top/", b"", {"type": tarfile.DIRTYPE, "mode": 0}),
        ("top/a.txt", "ü".encode(), {"mode": 0o4777, "uid": 0}),
        ("top/b/c.txt", CONTENT, {"mode": 0}),
    )
    with unpacked(path, tmp_path) as folder:
        assert (folder / "top" / "a.txt").read_text(encoding="utf-8") == "ü"
        assert (folder / "top" / "b" / "c.txt").read_bytes() == CONTENT
        assert not (folder / "top" / "a.txt").stat().st_mode & 0o4111
        os.rename(folder / "top", tmp_path / "kept")
    assert names(tmp_path) == ["a.tgz", "kept"]


OUT = {"type": tarfile.SYMTYPE, "linkname": "/tmp"}
EVIL = {
    "absolute": [("/tmp/evil", b"x")],
    "parent": [("good", b"x"), ("a/../../evil", b"x")],
    "the parent itself": [("..", b"", {"type": tarfile.DIRTYPE})],
    "backslash": [("..\\evil", b"x")],
    "symbolic link": [("evil", b"", OUT), ("evil/x", b"x")],
    "link inside": [("evil", b"", {"type": tarfile.SYMTYPE, "linkname": "good"})],
    "hard link": [("evil", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"})],
    "device": [("evil", b"", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})],
    "pipe": [("evil", b"", {"type": tarfile.FIFOTYPE})],
    "twice": [("evil", b"x"), ("evil", b"y")],
    "file as folder": [("evil", b"x"), ("evil/y", b"y")],
    "folder as file": [("evil/y", b"y"), ("evil", b"x")],
}


@pytest.mark.parametrize("members", EVIL.values(), ids=EVIL)
def test_an_evil_archive_is_refused_by_name_and_leaves_nothing(members, tmp_path):
    path = make_archive(tmp_path / "a.tgz", *members)
    with pytest.raises(ValueError, match=r"a.tgz is refused: '.*(evil|\.\.).*") as error:
        with unpacked(path, tmp_path):
            pytest.fail("unpacked")
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["a.tgz"] and not os.path.exists("/tmp/evil")


def cut(content):
    return content[: len(content) // 2]


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def flip_checksum(content):
    return content[:-8] + bytes([content[-8] ^ 1]) + content[-7:]


@pytest.mark.parametrize("damage", [cut, flip, flip_checksum])
def test_a_damaged_archive_is_refused(damage, tmp_path):
    path = make_archive(tmp_path / "a.tgz", ("a", CONTENT), ("b", b"x"))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"^.*a.tgz cannot be unpacked: [^\n]+$"):
        with unpacked(path, tmp_path):
            pytest.fail("unpacked")
    assert names(tmp_path) == ["a.tgz"]


def test_a_page_of_a_portal_is_no_archive(tmp_path):
    path = tmp_path / "a.tgz"
    path.write_text("<!DOCTYPE html> please log in")
    with pytest.raises(ValueError, match=r"a.tgz cannot be unpacked: it is no tar archive$"):
        with unpacked(path, tmp_path):
            pytest.fail("unpacked")
