"""What the READMEs say is so: their commands run, and their files, flags, functions, links and commits are there."""

import contextlib
import importlib
import io
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from codec import CODECS
from data.shapes import draw, move
from h264 import H264
from tests.conftest import ROOT

PAGES = ["README.md", "data/README.md", "plumbing/README.md", "studies/README.md", "assets/eurosat/README.md"]
FOREIGN = {"--lossless_jpeg", "--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-backend", "--rdzv-endpoint"}
FOREIGN |= {"--rdzv-id", "--no-deps", "--index-url", "--check", "--dist", "--signal", "--requeue", "--standalone"}
FOREIGN |= {"--rdzv_id", "--rdzv_backend", "--rdzv_endpoint"}


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def commands_of(text: str) -> list[list[str]]:
    """The words of every python and torchrun command in a block of code, or between backticks."""
    blocks = re.findall(r"(?:^    .*\n)+", text, re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [found.replace("\n", " ") for found in re.findall(r"`([^`]+)`", text)]
    parts = [part.strip() for line in lines for part in re.split(r"&&|\|", line)]
    return [shlex.split(part, comments=True) for part in parts if re.match(r"(srun )?(python|torchrun) ", part)]


# --- commands that run ----------------------------------------------------------------------------------------------

TESTED = re.compile(r"<!-- tested(.*?)-->\n\n((?:    .*\n)+)")


def more_flags(how: str) -> dict[str, list[str]]:
    """What a note adds to the commands below it, by script: train.py --steps 2; sample.py --count 1."""
    _, _, listed = how.partition(":")
    return {words[0]: words[1:] for words in map(str.split, filter(str.strip, listed.split(";")))}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files of the project, with pictures and films as a user may have them, and few of the built-in ones."""
    folder = tmp_path_factory.mktemp("clone")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in listed.stdout.split("\n") if name and (ROOT / name).is_file()]
    assert names, "not a clone"
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for kind in ("photos", "films"):
        (folder / kind).mkdir()
    for number in range(24):
        Image.fromarray(draw(number)).save(folder / "photos" / f"{number}.png")
        frames = [Image.fromarray(frame) for frame in move(number)]
        frames[0].save(folder / "films" / f"{number}.webp", save_all=True, append_images=frames[1:], duration=100)
    Image.fromarray(draw(99)).resize((200, 150)).save(folder / "photos" / "cat.jpg")
    codec = H264(height=64, fps=10)
    (folder / "film.mp4").write_bytes(codec.file(codec.encode(move(99))))
    for made in (["data/shapes", "--count", "60"], ["data/moving", "--moving", "--count", "24"]):
        subprocess.run([sys.executable, "-m", "data.shapes", *made], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("number", range(len(TESTED.findall(text_of("README.md")))))
def test_the_commands_of_a_block_run(number, clone):
    how, block = TESTED.findall(text_of("README.md"))[number]
    more, ran = more_flags(how), 0
    for line in block.splitlines():
        if "without the installation" in how and "pip install" in line:
            continue
        for part in line.strip().split(" && "):
            words = shlex.split(part)
            assert words[0] == "python"
            script = words[2] if words[1] == "-m" else words[1]
            command = [sys.executable, *words[1:], *more.pop(script, more_flags(how).get(script, []))]
            if "--serve" in words:
                serve_until_it_listens(command, clone)
            else:
                done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
                assert done.returncode == 0, f"{part}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            ran += 1
    assert ran and not more, f"{more} is for no command"


def serve_until_it_listens(command: list[str], folder: Path) -> None:
    command[command.index("--serve") + 1] = "0"  # the one of the README may be taken
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout.readline().startswith("http://localhost:")
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0
        finally:
            server.kill()


def test_all_that_is_not_marked_as_tested_needs_what_is_not_here():
    """Weights of the FID network, EuroSAT, a GPU, or hours."""
    text = TESTED.sub("", text_of("README.md"))
    elsewhere = re.compile(r"eurosat/t|--weights|torchrun|--jobs|--compile|pip install|vote out|tests\.benchmark")
    for block in re.findall(r"(?:^    .*\n)+", text, re.MULTILINE):
        for line in block.splitlines():
            if line.strip().startswith("python ") and "data/eurosat" not in line:
                assert elsewhere.search(line), f"not marked as tested: {line}"


# --- what is named is there -----------------------------------------------------------------------------------------


@cache
def help_of(script: str, *first: str) -> str:
    """What --help says, from within this process."""
    module, said = importlib.import_module(script.removesuffix(".py").replace("/", ".")), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        patch.setattr(sys, "argv", [script, *first, "--help"])
        module.main()
    return said.getvalue()


def script_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The script of a command, and its arguments; None for those of others."""
    for at, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[at + 1 :]
        if word == "-m" and words[at - 1].startswith("python"):
            return words[at + 1], words[at + 2 :]
    return None


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_of_a_command_is_one(page):
    for words in commands_of(text_of(page)):
        script, arguments = script_of(words) or (None, [])
        if script is None or script in ("venv", "pytest", "torch.distributed.run") or script.startswith("tests."):
            continue
        codec = next((["--codec", name] for name in CODECS if name in arguments and "--codec" in arguments), [])
        own = arguments[: arguments.index("--")] if "--" in arguments else arguments
        first = own[:1] if script == "studies.compare" and own[:1] == ["vote"] else codec if "data." in script else []
        told = help_of(script, *first)
        for flag in (word.split("=")[0] for word in own if re.match(r"--?[a-z]", word)):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", told) or flag == "--help", f"{script} has no {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_is_named_is_one_of_some_command(page):
    scripts = ["train.py", "sample.py", "fid.py", "data.prepare", "data.vq", "data.shapes", "studies.compare"]
    scripts += ["studies.scaling", "studies.tokens", "studies.video", "studies.positions", "plumbing.card"]
    told = "".join(help_of(script) for script in scripts) + help_of("studies.compare", "vote")
    told += "".join(help_of("data.prepare", "--codec", name) for name in ("jpeg", "h264", "pixels", "vq"))
    for flag in set(re.findall(r"`(--[a-z][\w-]*)", text_of(page))) - FOREIGN:
        assert re.search(rf"(?<![\w-]){flag}(?![\w-])", told), f"no command has {flag}"


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    text = text_of(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{link} of {page} is not there"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("page", PAGES)
def test_every_source_that_is_named_is_there(page):
    names = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for name in re.findall(r"`(?:[\w/]*/)?(\w+\.py)", text_of(page)):
        assert name in names, name


def test_what_the_table_of_files_names_is_in_those_files():
    rows = re.findall(r"^\| .*\]\(.*\|$", text_of("README.md"), re.MULTILINE)
    rows = [row for row in rows if re.search(r"\]\([\w/]+\.(py|md)", row)]
    assert len(rows) > 10
    for row in rows:
        files = [ROOT / path for path in re.findall(r"\]\(([\w/]+\.(?:py|md))", row)]
        sources = "".join(path.read_text() for path in files)
        folders = "".join(" ".join(each.name for each in path.parent.iterdir()) for path in files)
        for name in re.findall(r"`([\w.]+)`", row):
            for word in name.split(".") if not name.endswith(".py") else [name]:
                assert re.search(rf"\b{re.escape(word)}\b", sources + folders), f"{name} of: {row}"


@pytest.mark.parametrize("page", PAGES)
def test_every_commit_that_is_named_is_in_the_history(page):
    git = ["git", "-C", str(ROOT)]
    shallow = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True).stdout
    if shallow.strip() != "false":
        pytest.skip("without the whole history there is nothing to look commits up in")
    for commit in set(re.findall(r"\b(?:commits?|at|and) ([0-9a-f]{7})\b", text_of(page))):
        found = subprocess.run([*git, "cat-file", "-e", f"{commit}^{{commit}}"], capture_output=True)
        assert found.returncode == 0, f"{commit} is no commit"


def test_measurements_say_where_they_come_from():
    """In their paragraph or table, or beside it: the commit, or a link to where it stands; of plans the command."""
    measured = re.compile(r"\d (bits|dB|minutes|GB|s)\b|tokens/s|FID-768|\d% (lower|higher)")
    source = re.compile(r"commits? [0-9a-f]{7}|\]\((studies|plumbing)/README\.md#")
    parts, found = text_of("README.md").split("\n\n"), 0
    for at, part in enumerate(parts):
        if measured.search(part) and not part.startswith("    "):
            assert source.search("\n".join(parts[max(0, at - 2) : at + 3])), part
            found += 1
    assert found > 10


def test_the_readme_is_short_and_the_shipped_model_small():
    assert len(text_of("README.md").splitlines()) <= 300
    assert sum(path.stat().st_size for path in (ROOT / "assets/eurosat").rglob("*")) <= 8e6


def test_the_figures_are_drawn_anew_as_they_are(tmp_path):
    """Up to rounding, which another processor may do otherwise."""
    done = subprocess.run(
        [sys.executable, "-m", "show.figures", "assets/eurosat", str(tmp_path), "--seed", "15"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("anatomy.png", "grammar.png", "syntax.png"):
        with Image.open(tmp_path / name) as new, Image.open(ROOT / "assets" / name) as old:
            assert new.size == old.size
            assert (np.asarray(new).astype(int) != np.asarray(old)).mean() < 0.02
