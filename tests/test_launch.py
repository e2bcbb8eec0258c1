"""What is launched: which slices, which code, which gin files, by which script; and mistakes."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from launching import GIN, git, make_checkout

from flix_jax import cli, configuration, preemption
from flix_jax.experiments.launch import accelerators, checkout, job
from flix_jax.experiments.launch import worker as worker_script
from flix_jax.experiments.launch.shell import Shell, written

ROOT = Path(__file__).parent.parent

# Of Google Cloud's documentation, written down by hand: type, topology, chips, hosts (VMs).
# docs.cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e}: "Configurations" of each.
DOCUMENTED = """
v4-8            v4:2x2x1      4     1
v4-16           v4:2x2x2      8     2
v4-32           v4:2x2x4      16    4
v4-64           v4:2x4x4      32    8
v4-128          v4:4x4x4      64    16
v4-256          v4:4x4x8      128   32
v4-512          v4:4x8x8      256   64
v4-1024         v4:8x8x8      512   128
v4-4096         v4:8x16x16    2048  512
v5p-8           v5p:2x2x1     4     1
v5p-64          v5p:2x4x4     32    8
v5p-128         v5p:4x4x4     64    16
v5p-512         v5p:4x8x8     256   64
v5p-1024        v5p:8x8x8     512   128
v5p-8192        v5p:16x16x16  4096  1024
v5p-12288       v5p:16x16x24  6144  1536
v5litepod-1     v5e:1x1       1     1
v5litepod-4     v5e:2x2       4     1
v5litepod-8     v5e:2x4       8     1
v5litepod-16    v5e:4x4       16    4
v5litepod-256   v5e:16x16     256   64
v6e-1           v6e:1x1       1     1
v6e-8           v6e:2x4       8     1
v6e-16          v6e:4x4       16    4
v6e-64          v6e:8x8       64    16
v6e-256         v6e:16x16     256   64
"""
ROWS = [line.split() for line in DOCUMENTED.split("\n") if line]


@pytest.mark.parametrize("name, topology, chips, hosts", ROWS, ids=[row[0] for row in ROWS])
def test_chips_and_hosts_are_those_that_google_documents(name, topology, chips, hosts):
    by_type = accelerators.of_type(name)
    assert by_type == accelerators.of_topology(topology)
    assert (by_type.chips, by_type.hosts) == (int(chips), int(hosts))
    assert by_type.accelerator_type == name
    assert by_type.hosts * by_type.chips_per_host == by_type.chips


@pytest.mark.parametrize(
    "name, chips, hosts", [("v2-8", 4, 1), ("v2-32", 16, 4), ("v3-8", 4, 1), ("v3-128", 64, 16)]
)
def test_v2_and_v3_count_tensorcores(name, chips, hosts):
    slices = accelerators.of_type(name)
    assert (slices.chips, slices.hosts) == (chips, hosts)


@pytest.mark.parametrize(
    "name, runtime",
    [
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_is_that_which_google_documents_for_jax(name, runtime):
    assert accelerators.of_type(name).kind.runtime == runtime


def test_several_slices_multiply_the_chips_and_not_the_hosts_of_one():
    slices = accelerators.of_topology("v5e:16x16*2")
    assert slices == accelerators.of_topology("v5e:16x16", 2)
    assert slices == accelerators.of_type("v5litepod-256", 2)
    assert (slices.devices, slices.hosts) == (512, 64)


def test_an_unusual_shape_is_kept_and_a_type_without_a_usual_one_has_none():
    assert not accelerators.of_topology("v4:4x4x16").usual
    assert accelerators.of_type("v4-512").shape == "4x8x8"
    assert accelerators.of_type("v4-384").shape == ""


@pytest.mark.parametrize(
    "make, text, message",
    [
        (accelerators.of_type, "v4-127", "even number"),
        (accelerators.of_type, "v5e-256", "did you mean 'v5litepod-256'?"),
        (accelerators.of_type, "v5litepod-257", "v5litepod-257: a slice of 257 v5e chips"),
        (accelerators.of_type, "v4-12", "multiple of 4"),
        (accelerators.of_type, "v4-16384", "the largest has 4096"),
        (accelerators.of_type, "h100-8", "there is: 'v2-8'"),
        (accelerators.of_topology, "cpu:8", "a pod has TPUs"),
        (accelerators.of_topology, "v5e:3x4", "there is v5litepod-1, v5litepod-4"),
        (accelerators.of_topology, "v5e:8x2", "has the shape 4x4, not 8x2"),
        (accelerators.of_topology, "v4:8x8", "3 axes, for example v4:8x16x16"),
        (accelerators.of_topology, "v4:4x4x6", "multiples of 4"),
        (accelerators.of_topology, "v7:4x4", "unknown kind 'v7'"),
    ],
)
def test_a_slice_that_there_is_not_is_refused(make, text, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        make(text)
    assert text in str(error.value) and "\n" not in str(error.value)


# ------------------------------------------------------------------------------------- the code


def test_a_clean_checkout_is_packed_at_its_commit(tmp_path):
    commit = make_checkout(tmp_path / "code")
    (tmp_path / "code" / "notes.txt").write_text("not of the installation\n")
    found = checkout.find(str(tmp_path / "code"), allow_dirty=False)
    assert (found.commit, found.tree, found.version) == (commit, commit, commit[:12])
    assert packed(found, tmp_path) == {"flix_jax/__init__.py": "A = 1\n"}


def test_changed_files_are_refused_and_packed_as_they_are_on_request(tmp_path):
    folder = tmp_path / "code"
    commit = make_checkout(folder)
    (folder / "flix_jax" / "__init__.py").write_text("A = 2\n")
    with pytest.raises(ValueError, match=r"flix_jax/__init__.py differs from commit.*allow_dirty"):
        checkout.find(str(folder), allow_dirty=False)
    found = checkout.find(str(folder), allow_dirty=True)
    assert (found.commit, found.version) == (commit, f"{commit[:12]}-dirty")
    assert packed(found, tmp_path) == {"flix_jax/__init__.py": "A = 2\n"}
    assert git(folder, "stash", "list") == ""
    assert git(folder, "status", "--porcelain") == "M flix_jax/__init__.py"
    (folder / "flix_jax" / "more.py").write_text("")
    with pytest.raises(ValueError, match="more.py would not be packed: git does not track it"):
        checkout.find(str(folder), allow_dirty=True)


def test_a_folder_without_git_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no git checkout"):
        checkout.find(str(tmp_path), allow_dirty=True)


def packed(found, tmp_path) -> dict[str, str]:
    Shell().check(found.archive(str(tmp_path / "code.tar.gz")))
    with tarfile.open(tmp_path / "code.tar.gz") as archive:
        files = [member for member in archive if member.isfile()]
        return {member.name: archive.extractfile(member).read().decode() for member in files}


# -------------------------------------------------------------------------------- the gin files


def test_gin_files_of_ones_own_travel_under_their_names(tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    (here / "mine").mkdir(parents=True)
    elsewhere.mkdir()
    (here / "mine" / "part.gin").write_text("AdapterSpec.alpha = 3\n")
    (here / "mine" / "run.gin").write_text(
        "include 'configs/experiments/babel.gin'\ninclude 'mine/part.gin'\n"
    )
    (elsewhere / "more.gin").write_text("Run.seed = 5\n")
    monkeypatch.chdir(here)
    given = ["configs/adapters/flix.gin", "mine/run.gin", str(elsewhere / "more.gin")]
    there, copies = job.travelling(given, configuration.load(given).files)
    assert there == ("configs/adapters/flix.gin", "mine/run.gin", "more.gin")
    assert set(copies) == {"mine/run.gin", "mine/part.gin", "more.gin"}
    # Read from the copies alone, the configuration is the same.
    before = configuration.load(given).digest()
    for name, source in copies.items():
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, tmp_path / "there" / name)
    shutil.rmtree(elsewhere)
    monkeypatch.chdir(tmp_path / "there")
    assert configuration.load(there).digest() == before


def test_an_include_that_means_nothing_elsewhere_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "part.gin").write_text("Run.seed = 5\n")
    (tmp_path / "run.gin").write_text(f"include '{tmp_path / 'part.gin'}'\n")
    files = configuration.load(["run.gin"]).files
    with pytest.raises(ValueError, match="part.gin' is included by a path that workers do not"):
        job.travelling(["run.gin"], files)


def test_the_launched_folder_holds_the_gin_files_of_this_launch_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.gin").write_text("Run.seed = 5\n")
    found = checkout.Checkout("code", "a" * 40, "a" * 40)
    for name in ("old.gin", "sub/new.gin"):
        launched = job.Job("n", "gs://b/r", "there", found, "tpu", (name,), {name: "one.gin"})
        with pytest.raises(ValueError, match="git -C code archive"):  # there is no code
            launched.write(Shell())
    files = [path for path in Path("there/gin").rglob("*") if path.is_file()]
    assert files == [Path("there/gin/sub/new.gin")]
    assert files[0].read_text() == "Run.seed = 5\n"


def test_two_files_of_one_name_are_refused(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.gin").write_text("Run.seed = 5\n")
    given = [str(tmp_path / name / "run.gin") for name in ("a", "b")]
    with pytest.raises(ValueError, match="would both be run.gin"):
        job.travelling(given, configuration.load(given).files)


# ------------------------------------------------------------------------------ the workers' script


@pytest.fixture
def worker(tmp_path):
    """Runs the workers' script in a launched folder whose `flix` is a stand-in, of a text."""
    found = checkout.Checkout("code", "a" * 40, "a" * 40)
    bindings = ("A='it''s'", "B=(1, 2)")
    launched = job.Job("n", "gs://b/r", str(tmp_path), found, "tpu", ("x.gin",), {}, bindings)
    (tmp_path / "worker.sh").write_text(launched.files()["worker.sh"])
    flix = tmp_path / "code" / ".venv" / "bin" / "flix"
    flix.parent.mkdir(parents=True)

    def run(action, text=None):
        if text is not None:
            flix.write_text(f"#!/usr/bin/env bash\n{text}\n")
            flix.chmod(0o755)
        argv = ["bash", str(tmp_path / "worker.sh"), action]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60)

    run.folder, run.job = tmp_path, launched
    yield run
    subprocess.run(["bash", str(tmp_path / "worker.sh"), "stop"], capture_output=True, timeout=60)


def test_a_worker_trains_with_exactly_the_arguments_in_the_folder_of_the_gin_files(worker):
    done = worker("train", 'pwd; printf "%s\\n" "$FLIX_COMMIT" "$@"')
    lines = done.stdout.splitlines()
    assert lines[1:] == [str(worker.folder / "gin"), "a" * 12, *worker.job.train()[1:]]


@pytest.mark.parametrize("new_enough", [True, False])
def test_a_worker_installs_the_packed_code_and_a_python_if_it_has_none(
    new_enough, worker, monkeypatch
):
    scripts = worker.folder / "packed" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "_environment.sh").write_text(
        'ensure_environment() { echo "extra $1 with ${FLIX_PYTHON:-its own}"; }\n'
    )
    (worker.folder / "code" / "stale.py").write_text("")
    with tarfile.open(worker.folder / "code.tar.gz", "w:gz") as archive:
        archive.add(scripts, arcname="scripts")
    python = worker.folder / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$*" in -c*) exit {0 if new_enough else 1};; *find*) echo /managed/python;; esac\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("PATH", str(python.parent), prepend=":")
    done = worker("install")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"extra tpu with {'its own' if new_enough else '/managed/python'}\n"
    # What an earlier launch left is gone, but for the environment.
    assert {path.name for path in (worker.folder / "code").iterdir()} == {".venv", "scripts"}


@pytest.mark.parametrize("status", [0, 3])
def test_a_worker_trains_on_without_its_connection_and_tells_its_status(worker, status):
    assert worker("start", f"echo first; sleep 1; echo last; exit {status}").returncode == 0
    assert not (worker.folder / "status").exists()
    again = worker("start")
    assert (again.returncode, again.stdout) == (0, "training runs here already\n")
    done = worker("follow")
    assert done.returncode == status
    assert done.stdout.splitlines()[1:] == ["first", "last"]
    assert worker("follow").returncode == status  # and again, when it is over


def test_a_worker_that_was_killed_says_so_and_can_start_again(worker):
    worker("start", "sleep 100")
    assert worker("install").stdout == "training runs here already and is left alone\n"
    assert worker("lost").returncode == 0
    assert worker("stop").returncode == 0
    assert worker("follow").returncode == worker("lost").returncode == worker_script.LOST
    worker("start", "exit 0")
    assert worker("follow").returncode == worker("lost").returncode == 0


def test_training_that_was_asked_to_stop_is_lost_and_not_failed(worker):
    worker("start", f"exit {preemption.STATUS}")
    assert worker("follow").returncode == worker("lost").returncode == worker_script.LOST
    worker("start", "exit 2")
    assert (worker("follow").returncode, worker("lost").returncode) == (2, 0)


def test_the_script_passes_shellcheck(worker):
    path = worker.folder / "worker.sh"
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([check, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --------------------------------------------------------------------------------------- mistakes


def test_a_long_command_is_broken_into_lines_that_a_shell_reads_as_one():
    argv = ["printf", "%s\n", *(f"--flag_{i}=it's {i}" for i in range(30))]
    text = written(argv)
    assert max(map(len, text.split("\n"))) <= 100 and "\\\n" in text
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True)
    assert done.stdout.splitlines() == argv[2:]


BASE = [
    "launch",
    *GIN,
    "--run_dir=gs://b/runs/x",
    "--dry_run",
]
VM = [*BASE, "--engine=tpu_vm", "--zone=z", "--accelerator=v4-8"]


@pytest.fixture(scope="module")
def code(tmp_path_factory):
    """A clean checkout to launch."""
    folder = tmp_path_factory.mktemp("checkout")
    make_checkout(folder)
    return folder


@pytest.mark.parametrize(
    "argv, message",
    [
        ([*VM, "--run_dir=runs/x"], "it must be a bucket"),
        (
            [*VM, "--cluster=c"],
            "--cluster has no effect with --engine=tpu_vm; it goes with gke, xpk",
        ),
        ([*VM, "--topology=v5e:16x16"], "give one of --accelerator"),
        ([*BASE, "--engine=tpu_vm", "--accelerator=v4-8"], "--engine=tpu_vm needs --zone"),
        ([*VM[:-1], "--topology=v5e:16x16*2"], "--engine=queued_resource makes several"),
        ([*VM, "--name=Mine"], "--name=Mine: expected at most 40 lower-case letters"),
        ([*VM, "--detach", "--delete"], "--detach returns before training ends"),
        ([*VM, "--action=follow"], "--gin_file has no effect with --action=follow"),
        (
            [*BASE, "--engine=gke", "--topology=v5e:4x4", "--slices=0"],
            "--slices=0: expected at least 1",
        ),
        ([*VM, "--hours=0"], "--hours=0: expected more than 0"),
        ([*VM, "--gin.Run.batch_size=6"], "on 4 devices: batch_size 6 is not a positive multiple"),
        ([*VM, "--gin.Evaluation.batch_size=6"], "batch_size 6 is not a positive multiple of 4"),
        (
            [*VM, "--gin.MeshSpec.fsdp=3"],
            "on 4 devices: Mesh(data=-1, fsdp=3, model=1) does not fit",
        ),
        ([*VM, "--restarts=-1"], "--restarts=-1: expected at least 0"),
        ([*VM, "--gin.Run.sed=1"], "Run has no parameter 'sed'; did you mean 'seed'"),
        ([*VM, "--gin.Run.batch_size=0"], "Run.batch_size must be at least 1"),
        ([*BASE, "--engine=gke", "--accelerator=v3-8"], "has no v3; --engine=tpu_vm does"),
        ([*BASE, "--engine=gke", "--accelerator=v4-384"], "give --topology=v4:AxBxC"),
        ([*BASE, "--engine=gke", "--accelerator=v4-8", "--capacity=reserved"], "go together"),
        ([*BASE, "--engine=xpk", "--accelerator=v4-8"], "--engine=xpk needs --cluster"),
        ([*BASE, "--engine=slurm", "--nodes=0"], "--nodes=0: expected at least 1"),
        (["launch", "--engine=slum", "--run_dir=x"], "invalid choice: 'slum'"),
        (["launch", "--engine=slurm", "--run_dir=x"], "--gin_file is missing"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_run(
    argv, message, code, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*argv, f"--code={code}"]) == cli.USER_ERROR
    out, error = capfd.readouterr()
    assert message in error and error.count("\n") == 1
    assert "gcloud compute" not in out and "kubectl" not in out


def test_files_of_this_machine_are_refused_for_workers_elsewhere(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [
        "launch",
        "--gin_file=configs/experiments/ner_tiny.gin",
        "--engine=tpu_vm",
        "--accelerator=v4-8",
        "--zone=z",
        "--run_dir=gs://b/x",
        "--gin.DATA_DIR='data/xtreme_up_v1.1'",
    ]
    assert cli.main(argv) == cli.USER_ERROR
    error = capfd.readouterr().err
    assert "Run.source.data_dir = 'data/xtreme_up_v1.1'" in error and "bucket" in error


def test_translations_of_this_machine_are_refused_for_workers_elsewhere():
    given = ["configs/experiments/flare_real.gin", "configs/adapters/lora.gin"]
    given.append("configs/adapters/flare.gin")
    flags = ["DATA_DIR='gs://b/data'", "SourceText.files='{}mt/{{task}}/{{split}}/{{file}}.jsonl'"]

    def run(folder):
        files = [flags[0], flags[1].format(folder)]
        return configuration.load(given, files).build("Run")

    with pytest.raises(ValueError, match=r"Run.source_text.files = 'mt/\{task\}.*gs://"):
        job.check_run(run(""), shared=False)
    job.check_run(run("gs://b/"), shared=False)


def test_help_shows_an_example_and_loads_nothing_heavy():
    code = """
import sys
from flix_jax import cli
try:
    cli.main(["launch", "--help"])
finally:
    heavy = {"jax", "numpy", "tensorflow", "gin", "yaml"} & set(sys.modules)
    assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "example:\n  flix launch --engine=queued_resource" in done.stdout


# --------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--hours=2.5"], "# 160.0 chip-hours: 64 for 2.5 hours"),
        # 5000 steps of 1.8 seconds are 2.5 hours.
        (
            ["--step_seconds=1.8"],
            "# 160.0 chip-hours of training steps: 64 for 5000 steps of 1.8 s",
        ),
        ([], "# chip-hours unknown: give --hours, or --step_seconds as flix plan prints them"),
    ],
)
def test_chip_hours_are_told_as_far_as_they_are_known(
    flags, line, code, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    argv = [*BASE, "--engine=tpu_vm", "--zone=z", "--accelerator=v4-128"]
    assert cli.main([*argv, f"--code={code}", *flags]) == 0
    assert line in capfd.readouterr().out.splitlines()


def test_the_training_of_a_base_that_is_a_run_is_left_out_of_the_cost_and_not_of_the_mesh():
    given = ["configs/experiments/ner_tiny.gin"]
    run = configuration.load(given, ["DATA_DIR='gs://b/data'", "Run.batch_size=64"]).build("Run")
    text = job.cost(64, "chip", hours=None, run=run, seconds=1.8)
    assert text.startswith("9.6 chip-hours of training steps, without the training of its base: ")
    with pytest.raises(ValueError, match="on 64 devices: batch_size 16 is not"):
        job.check_mesh(run, 64)
    job.check_mesh(run, 16)


def test_the_version_is_noted_in_the_launched_folder_and_by_the_workers(tmp_path):
    commit = make_checkout(tmp_path / "code")
    found = checkout.find(str(tmp_path / "code"), allow_dirty=False)
    folder = tmp_path / "launched"
    launched = job.Job("n", "gs://b/r", str(folder), found, "tpu", ("x.gin",), {})
    launched.write(Shell())
    record = json.loads((folder / "launch.json").read_text())
    assert (record["commit"], record["changed"]) == (commit, False)
    assert f"FLIX_COMMIT={commit[:12]}" in (folder / "worker.sh").read_text()
    assert launched.bucket == f"gs://b/r/launch/{commit[:12]}"
    assert launched.labels["flix-commit"] == commit[:12]


# ----------------------------------------------------------------------------------------- the page


def blocks() -> list[str]:
    text = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    text = text.partition("## Processes of this machine")[0]
    return re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_page_shows_what_the_commands_print(code, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = checkout.find(str(code), allow_dirty=False)
    shown = blocks()  # a command, what it prints, the next command, ...
    assert len(shown) == 6
    for command, block in zip(shown[::2], shown[1::2], strict=True):
        argv = shlex.split(command.replace("\\\n", " "))[1:]
        assert cli.main([*argv, f"--code={code}"]) == 0
        out = capfd.readouterr().out
        for told, name in ((found.commit, "COMMIT"), (found.version, "VERSION")):
            out = out.replace(told, name)
        out = out.replace(str(code), "CODE").replace(str(tmp_path), "FOLDER")
        # Where lines are broken depends on the lengths of names.
        out, block = (text.replace(" \\\n    ", " ") for text in (out, block))
        assert block in out, out
        # A whole section: what comes before it and after it is another.
        before, after = out.split(block)
        assert before == "" or before.endswith("<==\n")
        assert after == "" or after.startswith("\n==> ")
