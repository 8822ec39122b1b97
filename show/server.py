"""A page on localhost on which files appear while the model writes them.

Its one request, POST /write with a prompt file as its body or nothing, is answered in lines of JSON as the tokens come:
what they add to the file, what their bits are and what they cost.  All visitors' files are rows of one batch, which
they join and leave at any token; a row ends when its file does, or its visitor is gone.
"""

import contextlib
import json
import math
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from codec import Codec, Tokenizer
from data.prepare import read
from data.sources import Item, Unusable
from grammar import FAR
from model import Cache, Llama
from plumbing.command import UserError
from plumbing.processes import ANY_LENGTH
from sample import Dice, Due, Sampling, draw, fitted, grammar_on, read_given
from show.hexdump import COLOURS
from show.surprise import over_symbols, part_side

LARGEST_PROMPT = 16 << 20  # bytes of a file that is dropped in
MOST_WAITING = 256  # visitors
TICK = 0.05  # seconds between what a visitor is sent
CPU = torch.device("cpu")

# --- the batch ------------------------------------------------------------------------------------------------------


class Ragged(Cache):
    """A Cache of files that began at different times: each row has a place of its own, and is hidden behind that."""

    def __init__(self, model: Llama):
        super().__init__(model.config, 0, model.config.context)
        weight = model.lm_head.weight
        self.keys = self.values = self.keys.to(weight)
        self.filled = torch.zeros(0, dtype=torch.long, device=weight.device)

    def join(self, cache: Cache) -> None:
        """Take in a file, of which `cache` knows the first tokens, or none."""
        for name in ("keys", "values"):
            both = getattr(self, name), getattr(cache, name).to(self.keys)
            room = max(each.shape[3] for each in both)
            setattr(self, name, torch.cat([F.pad(each, (0, 0, 0, room - each.shape[3])) for each in both], 1))
        self.filled = torch.cat([self.filled, self.filled.new_tensor([cache.length])])

    def begin(self, count: int) -> Tensor:
        self.place, self.filled = self.filled, self.filled + 1
        self.length = int(self.filled.max())
        self.hidden = torch.arange(self.length, device=self.place.device) <= self.place[:, None]  # (B, length)
        return self.place[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.grow(k, v, self.length)
        rows = torch.arange(len(self.place), device=self.place.device)
        self.keys[layer, rows, :, self.place], self.values[layer, rows, :, self.place] = k[:, :, 0], v[:, :, 0]
        return (
            self.keys[layer, :, :, : self.length],
            self.values[layer, :, :, : self.length],
            self.hidden[:, None, None],
        )

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.filled = self.filled[rows]


@dataclass
class Draft:
    """A file that is being written, which the batch writes and a visitor reads."""

    prompt: np.ndarray  # symbols
    seed: int
    sampling: Sampling
    tokens: list[int] = field(default_factory=list)  # behind the start
    costs: list[float] = field(default_factory=list)  # bits of each, nan where it was given
    over: bool = False
    trouble: str = ""
    left: bool = False  # by its visitor
    state: Any = None  # of the grammar, and
    dice: Any = None
    due: Any = None


class Batch:
    """Writes drafts, so many at once; the others wait for their turn."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, most: int):
        self.model, self.tokenizer, self.most = model, tokenizer, most
        self.grammar, self.device = grammar_on(CPU, tokenizer), model.lm_head.weight.device
        self.waiting: list[Draft] = []
        self.rows: list[Draft] = []
        self.cache, self.changed, self.closed = Ragged(model), threading.Condition(), False

    def add(self, draft: Draft) -> None:
        """Errors: UserError, where too many wait already."""
        with self.changed:
            if len(self.waiting) >= MOST_WAITING:
                raise UserError(f"{MOST_WAITING} visitors are waiting: come back later")
            self.waiting.append(draft)
            self.changed.notify()

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify()

    def run(self) -> None:
        """Until `close`, in a thread of its own.  An error of the machine, as of its memory, ends the files at work."""
        while not self.closed:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.rows or self.closed)
                self.waiting = [draft for draft in self.waiting if not draft.left]
                room = self.most - len(self.rows)
                new, self.waiting = self.waiting[:room], self.waiting[room:]
            try:
                self.round(new)
            except Exception as error:
                traceback.print_exc()
                for draft in self.rows + new:
                    draft.trouble, draft.over = f"the model cannot go on ({error}): try again", True
                self.rows, self.cache = [], Ragged(self.model)

    @torch.no_grad()
    @sdpa_kernel(ANY_LENGTH)
    def round(self, new: list[Draft]) -> None:
        """Take drafts in, let go of those that are over or whose visitor is gone, and write a token of each."""
        for draft in new:
            self.join(draft)
        if any(draft.over or draft.left for draft in self.rows):
            going = [i for i, draft in enumerate(self.rows) if not (draft.over or draft.left)]
            self.rows = [self.rows[i] for i in going]
            self.cache.keep(torch.tensor(going, dtype=torch.long, device=self.device))
        if self.rows:
            self.step()

    def join(self, draft: Draft) -> None:
        """Read a draft's prompt.  What is wrong with it goes to its visitor."""
        length, seeds = self.length_of(draft), [(draft.seed, 0)]
        try:
            begun, due = self.tokenizer.prompt(draft.prompt)
            (begun,), due = fitted(self.tokenizer, [begun], [due], length)
        except UserError as error:
            draft.trouble, draft.over = str(error), True
            return
        draft.dice, draft.due = Dice(seeds, length, CPU), Due(self.tokenizer, [begun], due)
        tokens, cache = torch.from_numpy(begun[None].astype(np.int64)), Cache(self.model.config, 1, length)
        draft.state, syntax = read_given(self.grammar, tokens)
        if len(begun) > 1:
            self.model(tokens[:, :-1].to(self.device), torch.stack(syntax[:-1], 1).to(self.device), cache)
        draft.tokens, draft.costs = begun[1:].tolist(), [math.nan] * (len(begun) - 1)
        self.rows.append(draft)
        self.cache.join(cache)

    def length_of(self, draft: Draft) -> int:
        """Tokens that a file may have."""
        return min(draft.sampling.length or FAR, self.model.config.context)

    def step(self) -> None:
        """A token for each."""
        last = [draft.tokens[-1] if draft.tokens else self.tokenizer.start for draft in self.rows]
        syntax = torch.stack([self.grammar.positions(draft.state) for draft in self.rows])
        logits = self.model(torch.tensor(last, device=self.device)[:, None], syntax.to(self.device), self.cache)
        logits = logits[:, -1].float().cpu()
        bits = -logits.log_softmax(-1) / math.log(2)
        for i, draft in enumerate(self.rows):
            at = len(draft.tokens) + 1
            room, unforced = self.length_of(draft) - 1 - at, torch.tensor([-1])
            token, draft.state = draw(
                self.grammar, draft.state, logits[i : i + 1], unforced, at, room, draft.dice, draft.sampling, draft.due
            )
            draft.costs.append(float(bits[i, token]))
            draft.tokens.append(int(token))  # after its cost, for visitors read meanwhile
            draft.over = int(token) == self.tokenizer.end or room == 0


# --- what a visitor is sent -----------------------------------------------------------------------------------------


def lines(draft: Draft, tokenizer: Tokenizer) -> Iterator[dict | None]:
    """What there is to tell of a draft, as it grows; None where there is nothing new.

    A line adds hexadecimal digits to the file, and symbols, beside each what its bits are and what it cost.
    """
    codec, read, shown, file, over = tokenizer.codec, 0, 0, 0, False
    while not over:
        over, tokens = draft.over, draft.tokens[:]
        if draft.trouble:
            yield {"error": draft.trouble}
            return
        if len(tokens) == read and not over:
            yield None
            continue
        read, symbols = len(tokens), tokenizer.decode(np.array(tokens, np.int64))
        inside = [token for token in tokens if token < tokenizer.start]  # all but the end
        costs = over_symbols(tokenizer, inside, draft.costs[: len(inside)]).tolist()
        kinds, units = codec.outline(symbols)
        known = len(symbols) if over else int((kinds >= 0).all(1).cumprod().sum())  # what follows may change those
        data = codec.file(symbols) if over else codec.begun(symbols[:known])
        if known == shown and not over:
            yield None
            continue
        line = {"file": data[file:].hex(), "symbols": symbols[shown:known].tolist()}
        line["kinds"] = kinds[shown:known].tolist()
        line["unit"] = -1 if over or not known else int(units[known - 1, -1])  # that may be half there
        line["costs"] = [None if math.isnan(cost) else round(cost, 2) for cost in costs[shown:known]]
        if over:
            line |= {"over": True, "bits": round(float(np.nansum(draft.costs)), 1), "wrong": codec.check(symbols)}
        shown, file = known, len(data)
        yield line


def about(codec: Codec, sampling: Sampling) -> dict[str, Any]:
    """What the page has to know."""
    kinds = [[name, "#" + bytes(COLOURS[name]).hex()] for name in codec.kinds]
    facts = {name: getattr(codec, name) for name in ("name", "suffix", "shape", "parts", "units")}
    facts |= {"side": part_side(codec.shape[-3], codec.units[-2])}
    facts |= {"digits": 2 if codec.symbols <= 256 else 4, "kinds": kinds, "grows": bool(codec.begun(np.empty(0, int)))}
    return facts | {"temperature": sampling.temperature, "top_p": sampling.top_p, "largest": LARGEST_PROMPT}


PAGE = Path(__file__).with_name("page.html")
decoding = threading.Lock()  # of prompts: one at a time, in one process of its own


def prompt_of(body: bytes, keep: float, codec: Codec) -> np.ndarray:
    """The first symbols of a file that was dropped in.  Errors: UserError."""
    if not body:
        return np.empty(0, codec.dtype)
    with decoding, tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prompt")
        path.write_bytes(body)
        try:
            pixels = next(iter(read(Item(str(path), 0, -1, "the file"), codec, Counter())), None)
        except Unusable as reason:
            raise UserError(f"the file cannot be used ({reason}): take another") from None
        if pixels is None:
            raise UserError("the file is too short: take another")
        return codec.head(codec.encode(pixels), codec.kept(keep))


class Visit(BaseHTTPRequestHandler):
    """One connection.  Nothing is served but the page and what POST /write writes, and to this machine's own pages
    alone: any page of the web could ask a browser to send a request here."""

    protocol_version, timeout, server_version, sys_version = "HTTP/1.1", 60, "jpeglm", ""
    server: "Server"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.turned_away("/"):
            return
        told = json.dumps(self.server.about).replace("<", "\\u003c")
        self.answer(200, PAGE.read_text().replace("{{about}}", told).encode(), "text/html; charset=utf-8")

    def do_POST(self) -> None:
        if self.turned_away("/write"):
            return None
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 9 or int(length) > LARGEST_PROMPT:
            return self.refuse(413, f"a file of up to {LARGEST_PROMPT >> 20} MiB is taken, with its length")
        body = self.rfile.read(int(length))
        try:
            draft = self.draft(dict(parse_qsl(urlsplit(self.path).query)), body)
            self.server.batch.add(draft)
        except (UserError, ValueError) as error:
            return self.refuse(400, str(error))
        try:
            self.send(draft)
        except (OSError, ValueError):  # the visitor is gone
            self.close_connection = True
        finally:
            draft.left = True

    def draft(self, asked: dict[str, str], body: bytes) -> Draft:
        """What was asked for.  Errors: UserError, ValueError."""
        sampling = self.server.sampling
        given = {name: float(asked[name]) for name in ("temperature", "top_p") if name in asked}
        if not 0 <= (seed := int(asked.get("seed", "0"))) < 2**63:
            raise UserError(f"seed is {seed}: choose 0 to {2**63 - 1}")
        codec = self.server.batch.tokenizer.codec
        prompt = prompt_of(body, float(asked.get("keep", "0.5")), codec)
        return Draft(prompt, seed, replace(sampling, **given))

    def welcome(self) -> bool:
        """Whether a page of this server asks, or no page at all."""
        port, origin = self.server.server_address[1], self.headers.get("Origin")
        own = f"localhost:{port}", f"127.0.0.1:{port}"
        return self.headers.get("Host") in own and (origin is None or origin.removeprefix("http://") in own)

    def turned_away(self, path: str) -> bool:
        """Whether one was refused who is not welcome, or asks for another path."""
        code = 403 if not self.welcome() else 404 if urlsplit(self.path).path != path else 0
        if code:
            self.refuse(code, "nothing is here for you")
        return bool(code)

    def send(self, draft: Draft) -> None:
        """The lines of a draft, in chunks.  Errors: OSError, when the visitor is gone."""
        self.send_response(200)
        for name, value in (("Content-Type", "application/x-ndjson"), ("Transfer-Encoding", "chunked")):
            self.send_header(name, value)
        self.common_headers()
        heard = time.monotonic()
        for line in lines(draft, self.server.batch.tokenizer):
            if line or time.monotonic() - heard > 1:  # an empty line says that one has to wait
                self.chunk((json.dumps(line) if line else "").encode() + b"\n")
                heard = time.monotonic()
            if gone(self.connection):
                raise ConnectionResetError
            time.sleep(TICK)
        self.chunk(b"")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def refuse(self, code: int, why: str) -> None:
        self.close_connection = True  # what was not read of the body would be taken for the next request
        self.answer(code, json.dumps({"error": why}).encode(), "application/json")

    def answer(self, code: int, data: bytes, kind: str) -> None:
        self.send_response(code)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(data)))):
            self.send_header(name, value)
        self.common_headers()
        self.wfile.write(data)

    def common_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        self.send_header("Content-Security-Policy", f"{policy}img-src blob: data:; media-src blob:")
        self.end_headers()


def gone(connection: socket.socket) -> bool:
    """Whether the other side has closed a connection, on which it sends nothing more."""
    ready, _, _ = select.select([connection], [], [], 0)
    return bool(ready) and connection.recv(1, socket.MSG_PEEK) == b""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, batch: Batch, sampling: Sampling):
        super().__init__(("127.0.0.1", port), Visit)
        self.batch, self.sampling = batch, sampling
        self.about = about(batch.tokenizer.codec, sampling)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), OSError):  # a visitor who is gone is no error
            super().handle_error(request, client_address)


def serve(port: int, model: Llama, tokenizer: Tokenizer, sampling: Sampling, most: int) -> None:
    """Serve the page until Ctrl-C.  Errors: UserError, where the port is taken."""
    batch = Batch(model, tokenizer, most)
    try:
        server = Server(port, batch, sampling)
    except (OSError, OverflowError) as error:
        raise UserError(f"--serve {port}: {error}: choose another port, or 0 for any") from None
    for number in (signal.SIGINT, signal.SIGTERM):  # also where the shell has its background ignore the first
        signal.signal(number, signal.default_int_handler)
    writing = threading.Thread(target=batch.run, daemon=True)
    writing.start()
    with server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://localhost:{server.server_address[1]} shows files as they are written; Ctrl-C ends", flush=True)
        server.serve_forever(poll_interval=0.2)
    batch.close()
    writing.join()  # a thread of torch's that outlives the process would abort it
