"""XTREME-UP's download from a server that serves a small release."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import loopback
import pytest

from flix_jax import cli
from flix_jax.data.cells import find
from flix_jax.experiments import download
from flix_jax.experiments.download import Pin, ner_pins, xtreme_up
from flix_jax.tasks.xtreme_up import XtremeUp

QA = {"question": "Nani?", "title": "", "context": "Ni mimi.", "target": "mimi"}
NER = {"text": "Ũkenya", "spans": [{"start_byte": 0, "limit_byte": 7, "label": "LOC"}]}
RELEASE = {
    "xtreme_up_v1.1/qa_in_lang/train/sw.jsonl": [QA, QA],
    "xtreme_up_v1.1/qa_in_lang/test/sw.jsonl": [QA],
    "xtreme_up_v1.1/retrieval_in_lang/index.jsonl": [QA],
}


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def archive(contents=RELEASE):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, records in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(content := lines(records))
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


NER_FILES = {"train/sw.jsonl": lines([NER, NER]), "test/sw.jsonl": lines([NER])}
PINS = tuple(
    Pin(name, len(content), hashlib.sha256(content).hexdigest())
    for name, content in NER_FILES.items()
)
NAME = "xtreme-up-v1.1.jsonl.tgz"


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr("flix_jax.experiments.transfer.time.sleep", lambda seconds: None)
    with loopback.serving() as site:
        site.content["/release.tgz"] = archive()
        site.content.update({f"/ner/{name}": content for name, content in NER_FILES.items()})
        yield site


@pytest.fixture
def get(site, tmp_path):
    said = []

    def get():
        said.clear()
        urls = {"url": f"{site.url}/release.tgz", "ner_url": f"{site.url}/ner/"}
        folder = xtreme_up(tmp_path / "data", **urls, pins=PINS, say=said.append)
        return folder, "\n".join(said)

    return get


def all_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_release_and_named_entities_become_one_folder_that_the_tasks_read(get, tmp_path):
    folder, said = get()
    source = XtremeUp(str(folder))
    assert [cell.name for cell in source.cells()] == ["ner/sw", "qa_in_lang/sw"]
    ner = find("ner/sw", source.cells())
    assert source.pairs(ner, "train") == (["Ũkenya"] * 2, ["LOC: Ũkenya"] * 2)
    assert "none is published to compare with" in said
    assert "2 files of MasakhaNER-X (CC BY-NC 4.0)" in said
    assert "4 files of 2 tasks: ner, qa_in_lang" in said
    assert (tmp_path / "data" / "downloads" / f"{NAME}.sha256").read_text().endswith(f"  {NAME}\n")
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_what_is_there_is_not_fetched_again(get, site, tmp_path):
    folder, _ = get()
    before = all_files(tmp_path)
    site.asked.clear()
    assert "is there already" in get()[1]
    assert not site.asked and all_files(tmp_path) == before
    (folder / "ner" / "test" / "sw.jsonl").unlink()
    get()
    assert not site.asked and all_files(tmp_path) == before, "it comes from the downloads"


def test_a_failure_keeps_what_came_before_it(get, site, tmp_path):
    site.missing = {"/ner/test/sw.jsonl"}
    with pytest.raises(ValueError, match="/ner/test/sw.jsonl: .*404.* may have moved") as error:
        get()
    by_hand = tmp_path / "data" / "downloads" / "MasakhaNER-X"
    assert f"{download.NER_FOLDER} of {download.NER_REPOSITORY} at {by_hand}" in str(error.value)
    folder = tmp_path / "data" / "xtreme_up_v1.1"
    assert all_files(folder) == sorted(n.partition("/")[2] for n in RELEASE), "no half of ner"
    site.missing.clear()
    site.asked.clear()
    get()
    assert [path for path, _ in site.asked] == ["/ner/test/sw.jsonl"]


def test_files_fetched_by_hand_are_used(get, site, tmp_path):
    downloads = tmp_path / "data" / "downloads"
    site.missing = set(site.content)
    with pytest.raises(ValueError, match=f"/release.tgz: .* put it at {downloads / NAME}, and run"):
        get()
    (downloads / NAME).write_bytes(archive())
    for name, content in NER_FILES.items():
        (downloads / "MasakhaNER-X" / name).parent.mkdir(parents=True)
        (downloads / "MasakhaNER-X" / name).write_bytes(content)
    site.asked.clear()
    assert len(XtremeUp(str(get()[0])).cells()) == 2 and not site.asked


def test_a_file_fetched_by_hand_must_be_the_known_one(get, site, tmp_path):
    path = tmp_path / "data" / "downloads" / "MasakhaNER-X" / "train" / "sw.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"{path} has the sha256 .* expected .*: remove it"):
        get()


def test_a_later_archive_must_be_the_first_one(get, site, tmp_path):
    folder, _ = get()
    downloads = tmp_path / "data" / "downloads"
    os.rename(folder, tmp_path / "old")
    assert "as of the first download" in get()[1]
    os.rename(folder, tmp_path / "older")
    (downloads / NAME).unlink()
    site.content["/release.tgz"] = archive({"x/qa/train/sw.jsonl": [QA]})
    with pytest.raises(ValueError, match=f"{NAME}.sha256 holds .* of an earlier download"):
        get()
    assert not folder.exists()
    (downloads / f"{NAME}.sha256").unlink()
    assert [cell.name for cell in XtremeUp(str(get()[0])).cells()] == ["ner/sw", "qa/sw"]


@pytest.mark.parametrize("prefix", ["", "./", "a/", "a/b/"])
def test_the_release_is_found_wherever_the_archive_holds_it(prefix, get, site):
    site.content["/release.tgz"] = archive({f"{prefix}qa/train/sw.jsonl": [QA], "LICENSE": []})
    folder, _ = get()
    assert (folder / "qa" / "train" / "sw.jsonl").exists()
    assert folder.stat().st_mode & 0o055 == 0o055 or os.umask(0o022) != 0o022


@pytest.mark.parametrize(
    "contents, problem",
    [
        ({"x/sw.jsonl": [QA]}, "it is not the release"),
        ({"../xtreme_up_v1.1/qa/train/sw.jsonl": [QA]}, "may lie outside the folder"),
    ],
)
def test_another_archive_is_not_taken_for_the_release(contents, problem, get, site, tmp_path):
    site.content["/release.tgz"] = archive(contents)
    with pytest.raises(ValueError, match=problem):
        get()
    assert all_files(tmp_path) == [f"data/downloads/{NAME}"], "nor is its digest noted"


def test_named_entities_that_are_others_stay_and_are_named(get, site):
    site.content["/release.tgz"] = archive({**RELEASE, "xtreme_up_v1.1/ner/train/sw.jsonl": [NER]})
    folder, said = get()
    assert (folder / "ner" / "train" / "sw.jsonl").read_bytes() == lines([NER])
    assert "not MasakhaNER-X's and left as they are: train/sw.jsonl" in said


def test_the_command_says_in_one_line_what_to_do(site, tmp_path, capsys):
    site.missing.add("/release.tgz")
    flags = [f"--out={tmp_path}", f"--url={site.url}/release.tgz"]
    assert cli.main(["download", "xtreme_up", *flags]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"error: could not fetch {site.url}/release.tgz: the server")
    assert cli.main(["download", "xtreme_up", "--out=gs://bucket/x"]) == cli.USER_ERROR
    assert "not a local folder" in capsys.readouterr().err


def test_the_known_files_are_the_benchmarks():
    pins = ner_pins()
    names = {tuple(pin.name.removesuffix(".jsonl").split("/")) for pin in pins}
    # The languages of XTREME-UP's ner (arXiv 2305.11938, Table 2).
    languages = "am bm bbj ee ha ig rw lg luo mos ny pcm sn sw tn tw wo xh yo zu".split()
    assert names == {(s, lang) for s in ("train", "validation", "test") for lang in languages}
    assert len(pins) == 60 and all(len(pin.sha256) == 64 and pin.size > 0 for pin in pins)


@pytest.mark.skipif("XTREME_UP_DIR" not in os.environ, reason="XTREME_UP_DIR is not set")
def test_the_known_digests_are_those_of_the_real_files():
    ner = Path(os.environ["XTREME_UP_DIR"], "ner")
    here = [pin for pin in ner_pins() if (ner / pin.name).exists()]
    assert len(here) > 50
    for pin in here:
        content = (ner / pin.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (pin.size, pin.sha256)
