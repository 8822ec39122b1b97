"""What is shown of a file is what is in it: kinds of bits, bits of parts, and the very files that sample.py writes."""

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import jpeg
import sample
from codec import JPEG, Pixels, standard_codes
from data.shapes import draw, move
from data.stream import Stream
from grammar import Illegal
from h264 import H264
from model import Llama
from plumbing.checkpoint import read_run
from plumbing.command import UserError
from sample import Sampling
from show.server import Batch, Draft, Server, serve
from show.surprise import bits_of, coded, costs, heated, part_side, recompressed, save_bits
from tests.conftest import ROOT, config, short_run
from train import Config, evaluate

CPU = torch.device("cpu")

# --- outlines -------------------------------------------------------------------------------------------------------

CODECS = JPEG(), JPEG(restart=0), JPEG(restart=3, header=True, quality=90), JPEG(subsampling="4:4:4"), H264(height=64)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_every_bit_of_a_whole_file_is_of_some_kind_and_parts_follow_one_another(codec):
    for number in range(4):
        symbols = codec.encode(move(number) if codec.name == "h264" else draw(number))
        kinds, units = codec.outline(symbols)
        assert kinds.shape == units.shape == (len(symbols), 8)
        assert kinds.min() >= 0 and kinds.max() < len(codec.kinds)
        known = units[units >= 0]
        assert (np.diff(known) >= 0).all() and {*known} == {*range(int(np.prod(codec.units)))}


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_the_outline_of_a_beginning_is_the_beginning_of_the_outline(codec):
    symbols = codec.encode(move(1) if codec.name == "h264" else draw(1))
    kinds, units = codec.outline(symbols)
    for cut in (0, 1, 2, len(symbols) // 3, len(symbols) - 1):
        some = codec.outline(symbols[:cut])
        known = some.kinds >= 0
        assert (some.kinds == kinds[:cut])[known].all() and (some.units == units[:cut])[known].all()
        assert known[: max(0, cut - 8)].all()  # but for a code, and what may become a marker


@pytest.mark.parametrize("codec", [JPEG(restart=0), JPEG(restart=0, quality=80, subsampling="4:4:4")], ids=repr)
def test_the_parser_and_the_automaton_agree_which_bits_are_of_DC(codec):
    luma = {"4:2:0": 4, "4:4:4": 1}[codec.subsampling]
    machine = jpeg.automaton(standard_codes(), codec.bounds.sizes, luma)
    of_dc = np.any(jpeg.parts_of(machine), 0)
    data = bytes(codec.encode(draw(3)))
    kinds, units = codec.outline(np.frombuffer(data, np.uint8))
    state = mcu = 0
    for i in range(len(data)):
        for bit in range(8) if i == 0 or data[i - 1 : i + 1] != b"\xff\0" else ():
            if mcu == codec.mcus:
                assert codec.kinds[kinds[i, bit]] == "padding"
                continue
            assert (codec.kinds[kinds[i, bit]] == "DC") == of_dc[state] and units[i, bit] == mcu
            state = machine.steps[state, data[i] >> 7 - bit & 1]
            if state == machine.end:
                state, mcu = 0, mcu + 1
    assert mcu == codec.mcus


def test_markers_and_end_of_block_codes_are_where_the_bytes_say():
    codec = JPEG()
    symbols = codec.encode(draw(0))
    kinds, _ = codec.outline(symbols)
    found = [match.start() for match in re.finditer(rb"\xff[\xd0-\xd7]", symbols.tobytes())]
    assert np.flatnonzero((kinds == jpeg.MARKER).all(1)).tolist() == sorted(found + [at + 1 for at in found])
    flat = codec.outline(codec.encode(np.full((64, 64, 3), 128, np.uint8))).kinds  # 4 bits of luma, 2 of chroma (K.3)
    assert (flat == jpeg.END_OF_BLOCK).sum() == 16 * (4 * 4 + 2 * 2)


def test_a_damaged_file_has_an_outline_up_to_its_damage():
    codec = H264(height=64)
    symbols = codec.encode(move(0)).copy()
    symbols[500:] ^= 0x5A
    with pytest.raises(Illegal):
        raise Illegal(codec.check(symbols))
    kinds, _ = codec.outline(symbols)
    assert (kinds[:490] >= 0).all() and (kinds[520:] < 0).all()


def test_what_is_begun_of_a_file_is_how_the_file_begins():
    codec = JPEG(restart=3)
    symbols = codec.encode(draw(2))
    for cut in range(len(symbols) + 1):
        assert codec.file(symbols).startswith(codec.begun(symbols[:cut]))


# --- surprise -------------------------------------------------------------------------------------------------------


def test_bits_of_files_are_those_that_validation_reports(finished, prepared):
    model, tokenizer, _ = read_run(finished, CPU)
    stream = Stream(prepared, "val", len(tokenizer.grammar.sizes))
    settings = config(prepared, finished, "--context", "40")  # files in pieces
    found = evaluate(model, stream, tokenizer.grammar, fitted_to(model, settings), CPU)
    documents = np.split(stream.read(0, int(stream.documents[-1])), stream.documents[1:-1])
    model.config = fitted_to(model, settings)
    bits = np.array([[each.sum() for each in bits_of(model, tokenizer, tokens)] for tokens in documents]).mean(0)
    np.testing.assert_allclose(bits, [found["bits_per_file"], found["legal_bits_per_file"]], rtol=1e-5)


def fitted_to(model: Llama, settings: Config) -> Config:
    return replace(settings, vocab=model.config.vocab, positions=model.config.positions)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A run on clips, hardly trained."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "films").mkdir()
    for i in range(30):
        frames = [Image.fromarray(frame) for frame in move(i, 32, 3)]
        path = folder / "films" / f"{i}.webp"
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=333, lossless=True)
    codec = H264(width=32, height=32, frames=3)
    flags = ["--context", "512", "--samples", "1", "--syntax"]
    short_run(folder / "films", folder, codec, 300, 0.2, *flags)
    return folder


def test_parts_of_a_picture_cost_what_its_symbols_do(finished, photos, clips):
    for run, source in ((finished, photos), (clips / "run", clips / "films")):
        model, tokenizer, _ = read_run(run, CPU)
        for cost, _ in zip(costs(model, tokenizer, [source]), range(3), strict=False):
            inside = (cost.outline.units >= 0).mean(1)
            assert cost.units.shape == tokenizer.codec.units and len(cost.each) == len(cost.symbols)
            assert cost.units.sum() == pytest.approx((cost.each * inside).sum())
            tokens = tokenizer.encode([cost.symbols])[0]
            assert cost.total == pytest.approx(cost.each.sum() + bits_of(model, tokenizer, tokens)[0][-1], rel=1e-5)
            assert cost.legal <= cost.total


def test_a_sheet_is_drawn_of_each_file(finished, photos, clips, tmp_path, capsys):
    for run, source in ((finished, photos / "class0"), (clips / "run", clips / "films" / "3.webp")):
        sample.main([str(run), "--surprise", str(source), "--to", str(tmp_path / run.parent.name)])
        sheets = sorted((tmp_path / run.parent.name).iterdir())
        assert len(sheets) == (1 if source.is_file() else len([*source.iterdir()]))
        with Image.open(sheets[0]) as sheet:
            assert sheet.width > 600 and len(sheet.getcolors(1 << 20)) > 50
    with pytest.raises(UserError, match="no usable file"):
        sample.main([str(finished), "--surprise", str(tmp_path / "nothing.png")])
    with pytest.raises(UserError, match="not allowed with"):
        sample.main([str(finished), "--surprise", "a.png", "--bits", "b"])


@pytest.mark.parametrize("codec", [JPEG(size=50), JPEG(size=36, subsampling="4:4:4"), Pixels(size=20), H264(height=50)])
def test_parts_are_as_large_as_they_are(codec):
    side = part_side(codec.shape[-3], codec.units[-2])
    assert (
        side == {"jpeg": 16 if getattr(codec, "subsampling", "") == "4:2:0" else 8, "h264": 16, "pixels": 1}[codec.name]
    )
    assert (codec.units[-2] - 1) * side < codec.shape[-3] <= codec.units[-2] * side
    grey = heated(np.full((50, 50, 3), 128, np.uint8), np.eye(4), 1.0, 50)
    shown = np.asarray(grey).astype(int)
    assert (shown[15, 15] != shown[15, 16]).any() and (shown[0, 16] == shown[0, 49]).all()


def test_bits_json_holds_what_each_file_costs(finished, photos, tmp_path, capsys):
    model, tokenizer, _ = read_run(finished, CPU)
    save_bits(tmp_path, costs(model, tokenizer, [photos]))
    found = json.loads((tmp_path / "bits.json").read_text())
    assert len(found["files"]) == 60
    whole, data = found["means"]["the jpg file"]
    assert whole - data == len(tokenizer.codec.file(np.empty(0, np.uint8)))
    for row, cost in zip(found["files"], costs(model, tokenizer, [photos]), strict=True):
        assert row["the model"][0] * 8 == pytest.approx(cost.total)
    assert f"{8 * found['means']['the model'][0]:,.1f} bits a file" in capsys.readouterr().out


@pytest.mark.skipif(not shutil.which("jpegtran"), reason="jpegtran is not installed")
def test_recompressors_keep_the_picture_and_their_data_are_counted_without_header(tmp_path):
    codec = JPEG(restart=0)
    file = codec.file(codec.encode(draw(0)))
    sizes = recompressed(file)
    whole, data = sizes["jpegtran -optimize"]
    assert coded(file) == len(codec.encode(draw(0))) and data < coded(file) and whole < len(file)
    assert coded(b"no jpeg") == 7


# --- the server -----------------------------------------------------------------------------------------------------


@contextmanager
def served(run: Path, most: int = 4):
    """A server and its port."""
    model, tokenizer, _ = read_run(run, CPU)
    batch = Batch(model, tokenizer, most)
    threading.Thread(target=batch.run, daemon=True).start()
    with Server(0, batch, Sampling()) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield server, server.server_address[1]
        finally:
            server.shutdown()
            batch.close()


def ask(port: int, path: str = "/write", body: bytes = b"", method: str = "POST", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("localhost", port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read()


def written(port: int, query: str = "", body: bytes = b"") -> tuple[bytes, list[dict]]:
    """A file, and the lines it came in."""
    status, text = ask(port, f"/write?{query}", body)
    assert status == 200, text
    told = [json.loads(line) for line in text.splitlines() if line]
    return b"".join(bytes.fromhex(line.get("file", "")) for line in told), told


def test_what_is_served_is_what_sample_writes_whoever_else_is_there(finished, tmp_path):
    for seed in range(6):
        sample.main([str(finished), "--count", "1", "--seed", str(seed), "--to", str(tmp_path / str(seed))])
    found = {}
    with served(finished) as (_, port):

        def visit(seed: int) -> None:
            time.sleep(0.07 * seed)  # to join those who are there already; four at most
            found[seed] = written(port, f"seed={seed}")

        visitors = [threading.Thread(target=visit, args=(seed,)) for seed in range(6)]
        for each in visitors:
            each.start()
        for each in visitors:
            each.join()
    _, tokenizer, _ = read_run(finished, CPU)
    for seed, (file, told) in found.items():
        assert file == (tmp_path / str(seed) / "00000.jpg").read_bytes()
        symbols = np.array([symbol for line in told for symbol in line["symbols"]], np.uint8)
        kinds = [kind for line in told for kind in line["kinds"]]
        assert told[-1]["over"] and told[-1]["wrong"] is None is tokenizer.codec.check(symbols)
        assert kinds == tokenizer.codec.outline(symbols).kinds.tolist()
        assert told[-1]["bits"] >= sum(cost for line in told for cost in line["costs"]) - 1


def test_a_prompt_is_completed_as_by_sample(finished, photos, clips, tmp_path):
    for run, path in ((finished, photos / "class0" / "0.png"), (clips / "run", clips / "films" / "7.webp")):
        to = tmp_path / run.parent.name
        keep = 0.5 if run == finished else 0.34
        sample.main([str(run), "--prompt", str(path), "--keep", str(keep), "--to", str(to)])
        (file,) = (path for path in to.glob("keep_*/00000.*"))
        with served(run) as (_, port):
            data, told = written(port, f"keep={keep}", path.read_bytes())
        assert data == file.read_bytes()
        given = sum(cost is None for line in told for cost in line["costs"])
        codec = read_run(run, CPU)[1].codec
        symbols = np.array([symbol for line in told for symbol in line["symbols"]], np.uint8)
        assert 0 < given <= len(codec.head(symbols, codec.kept(keep)))


def test_one_who_leaves_is_written_no_further(finished):
    with served(finished, most=1) as (server, port):
        batch = server.batch
        slow = batch.step
        batch.step = lambda: (time.sleep(0.05), slow())
        with socket.create_connection(("localhost", port)) as leaver:
            leaver.sendall(f"POST /write HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 0\r\n\r\n".encode())
            assert leaver.recv(100).startswith(b"HTTP/1.1 200")
            while not batch.rows:
                time.sleep(0.01)
            (row,) = batch.rows
        written(port)  # waits for the one place
        assert row.left and not row.over


@pytest.mark.parametrize(
    ("status", "why", "asked"),
    [
        (404, "nothing", {"path": "/../../etc/passwd", "method": "GET"}),
        (404, "nothing", {"path": "/show/server.py", "method": "GET"}),
        (403, "nothing", {"Host": "example.com", "path": "/", "method": "GET"}),
        (403, "nothing", {"Origin": "http://example.com"}),
        (413, "16 MiB", {"Content_Length": str((16 << 20) + 1)}),
        (413, "16 MiB", {"Content_Length": "9" * 5000}),
        (413, "16 MiB", {"Transfer_Encoding": "chunked"}),
        (400, "cannot be used", {"body": b"no picture"}),
        (400, "temperature", {"path": "/write?temperature=-1"}),
        (400, "temperature", {"path": "/write?temperature=nan"}),
        (400, "keep", {"path": "/write?keep=1.5", "body": "picture"}),
        (400, "seed", {"path": "/write?seed=-1"}),
        (400, "float", {"path": "/write?keep=x"}),
    ],
)
def test_what_is_refused(finished, photos, status, why, asked):
    if asked.get("body") == "picture":
        asked |= {"body": (photos / "class0" / "0.png").read_bytes()}
    with served(finished) as (_, port):
        code, text = ask(port, **asked)
        assert code == status and why in json.loads(text)["error"], text
        assert written(port)[1][-1]["over"]  # and the next one is served


def test_too_many_visitors_and_a_failing_machine_are_told(finished, monkeypatch):
    model, tokenizer, _ = read_run(finished, CPU)
    batch = Batch(model, tokenizer, 1)
    draft = Draft(np.empty(0, np.uint8), 0, Sampling())
    batch.waiting = [draft] * 256
    with pytest.raises(UserError, match="256 visitors are waiting"):
        batch.add(draft)
    with served(finished) as (server, port):
        broken = monkeypatch.setattr(server.batch, "step", lambda: 1 / 0)
        assert "cannot go on" in written(port)[1][-1]["error"]
        monkeypatch.undo()
        assert broken is None and written(port)[1][-1]["over"]


def test_a_port_that_is_taken_is_named(finished):
    model, tokenizer, _ = read_run(finished, CPU)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--serve {port}: .*choose another port"):
            serve(port, model, tokenizer, Sampling(), 1)
    with pytest.raises(UserError, match="choose another port"):
        serve(99_999, model, tokenizer, Sampling(), 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it_in_order_while_it_writes(finished, number):
    flags = [sys.executable, "sample.py", str(finished), "--serve", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(flags, cwd=ROOT, **pipes) as server:
        try:
            port = int(re.search(r"localhost:(\d+)", server.stdout.readline())[1])
            with socket.create_connection(("localhost", port)) as visitor:
                visitor.sendall(f"POST /write HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 0\r\n\r\n".encode())
                assert visitor.recv(100).startswith(b"HTTP/1.1 200")
                server.send_signal(number)
                assert server.wait(30) == 0 and not server.stderr.read()
        finally:
            server.kill()


@pytest.fixture(scope="module")
def pixels(photos, tmp_path_factory) -> Path:
    return short_run(photos, tmp_path_factory.mktemp("pixels"), Pixels(size=8, colours=8), None, 0.1, "--context", "80")


def test_the_page_paints_the_file_in_a_browser(finished, pixels, clips, photos, browser):
    """The canvas shows what Pillow reads of the same file, the dump every byte; a prompt can be chosen."""
    from selenium.webdriver.common.by import By

    for run in (finished, pixels, clips / "run"):
        codec = read_run(run, CPU)[1].codec
        with served(run) as (_, port):
            browser.get(f"http://localhost:{port}/")
            if run == finished:
                browser.find_element(By.ID, "file").send_keys(str(photos / "class0" / "0.png"))
            body = (photos / "class0" / "0.png").read_bytes() if run == finished else b""
            data, told = written(port, "keep=0.5", body)
            browser.find_element(By.ID, "write").click()
            wait_for(lambda: "a whole valid file" in browser.find_element(By.ID, "said").text)
            assert len(browser.find_elements(By.CSS_SELECTOR, "#dump b")) == sum(len(x["symbols"]) for x in told)
            if codec.name == "h264":
                size = "return [...document.querySelectorAll('video')].map(v => [v.videoWidth, v.videoHeight, v.error])"
                wait_for(lambda size=size: browser.execute_script(size) == [[32, 32, None]] * 2)
                continue
            symbols = np.array([symbol for line in told for symbol in line["symbols"]], codec.dtype)
            want = codec.decode(symbols).astype(int)
            wait_for(lambda want=want: np.abs(on_canvas(browser, want.shape) - want).mean() < 2)
            assert np.abs(on_canvas(browser, want.shape) - want).max() <= 24  # chroma is enlarged otherwise
    assert not browser.get_log("browser")


def on_canvas(browser, shape: tuple[int, int, int]) -> np.ndarray:
    script = "const c = document.querySelector('canvas');"
    script += "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
    return np.array(browser.execute_script(script)).reshape(*shape[:2], 4)[..., :3]


def test_a_closed_tab_stops_its_row(finished, browser):
    from selenium.webdriver.common.by import By

    with served(finished) as (server, port):
        batch = server.batch
        slow = batch.step
        batch.step = lambda: (time.sleep(0.1), slow())
        first = browser.current_window_handle
        browser.switch_to.new_window("tab")
        browser.get(f"http://localhost:{port}/")
        browser.find_element(By.ID, "write").click()
        wait_for(lambda: batch.rows)
        browser.close()
        browser.switch_to.window(first)
        wait_for(lambda: not batch.rows, 5)


def wait_for(true, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
