"""The blind comparison: what the page shows, hides and counts."""

import base64
import io
import json
import re
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from plumbing.command import UserError
from plumbing.draw import save_pixels
from studies import compare
from studies.contest import Comparison, opened

PAIRS, SIZE = 14, 32


@pytest.fixture
def out(tmp_path) -> Path:
    """A comparison of pictures that are all different, of which one model wrote fewer, and smaller ones."""
    rng, folder = np.random.default_rng(0), tmp_path / "out"
    settings = asdict(Comparison(size=SIZE, count=PAIRS)) | {"codecs": ["jpeg", "vq8"], "train": [], "data": "data"}
    folders = {"test/whole": (PAIRS, SIZE)}
    folders |= {f"samples/{name}/whole-0/keep_0.5": (PAIRS, SIZE) for name in ("jpeg-flops", "vq8-flops")}
    folders["samples/pixels16-pictures/whole-0/keep_0.5"] = (PAIRS - 3, 16)
    for name, (count, size) in folders.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            save_pixels(folder / name / f"{number:05d}", rng.integers(0, 256, (size, size, 3), np.uint8))
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def written(out: Path, *flags: str) -> tuple[bytes, dict]:
    """The page, and what it hides."""
    compare.main(["vote", str(out), *flags])
    data = (out / "vote.html").read_bytes()
    (hidden,) = re.findall(rb'atob\("([^"]+)"\)', data)
    return data, json.loads(base64.b64decode(hidden))


def pixels_of(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))) as image:
        return np.asarray(image.convert("RGB"))


def test_each_pair_shows_what_two_models_made_of_one_picture(out):
    _, hidden = written(out, "--models", "jpeg-flops", "pixels16-pictures", "--pairs", "9")
    assert len(hidden["pairs"]) == 9 == len({pair["picture"] for pair in hidden["pairs"]})
    assert hidden["titles"] == ["JPEG", "pixels, 16x16, as many pictures as JPEG"]
    for pair in hidden["pairs"]:
        assert {*pair["sides"]} == {"jpeg-flops", "pixels16-pictures"}
        for side, name in zip(("left", "right"), pair["sides"], strict=True):
            file = out / "samples" / name / "whole-0" / "keep_0.5" / f"{pair['picture']:05d}.png"
            assert (pixels_of(pair[side]) == opened(file, SIZE)).all()  # of one size, whatever the model's
        given, whole = pixels_of(pair["given"]), opened(out / "test/whole" / f"{pair['picture']:05d}.png", SIZE)
        assert (given[: SIZE // 2] == whole[: SIZE // 2]).all() and (given[SIZE // 2 :] == 128).all()


def test_sides_and_order_are_shuffled_by_the_seed_alone(out):
    first, hidden = written(out)
    assert written(out)[0] == first != written(out, "--seed", "1")[0]
    order = [pair["picture"] for pair in hidden["pairs"]]
    assert sorted(order) == [*range(PAIRS)] != order
    left = Counter(pair["sides"][0] for pair in hidden["pairs"])
    assert min(left.values()) >= 3 and len(left) == 2


def test_nothing_in_the_text_of_the_page_says_which_is_which(out):
    data, hidden = written(out)
    for word in (*hidden["models"], *hidden["titles"], b"vq", b"codec"):
        assert (word if isinstance(word, bytes) else word.encode()) not in data
    assert not re.search(rb"(src|href)=\"?http|url\(|import ", data)  # and it needs nothing from elsewhere


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ([" --models jpeg-flops vq4-flops"], "choose two of jpeg-flops, vq8-flops, pixels16-pictures"),
        ([" --models jpeg-flops jpeg-flops"], "choose two of"),
        ([" --keep 0.25"], "0 models that completed --keep 0.25: choose of 0.5"),
        ([" --pairs 1"], "--pairs 1 of 14 completions: choose 2 or more"),
        ([" --seed -1"], "--seed is -1"),
        ([" --count nothing.json"], "nothing.json cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_refused(out, flags, why):
    with pytest.raises(UserError, match=why):
        compare.main(["vote", str(out), *flags[0].split()])


def test_a_folder_of_several_comparisons_is_refused_by_name(out, tmp_path):
    with pytest.raises(UserError, match=r"holds no comparison: name one of its folders \(out\)"):
        compare.main(["vote", str(tmp_path)])
    with pytest.raises(UserError, match="first"):
        compare.main(["vote", str(tmp_path / "nowhere")])


def test_votes_by_key_are_counted_as_they_were_cast(out, tmp_path, browser, capsys):
    """With an undo and a reload on the way; interval and p are scipy's; the saved result counts the same."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    data, hidden = written(out)
    browser.get((out / "vote.html").as_uri())
    body = lambda: browser.find_element(By.TAG_NAME, "body")  # noqa: E731
    cast, keys = [], {"left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT, "tie": Keys.SPACE}
    for number, pair in enumerate(hidden["pairs"]):
        assert f"{number + 1} of {PAIRS}" in body().text and "JPEG" not in body().text
        assert browser.find_element(By.CSS_SELECTOR, "#left img").get_attribute("src") == pair["left"]
        if number == 5:
            body().send_keys(Keys.ARROW_LEFT)
            body().send_keys(Keys.BACKSPACE)
        if number == 7:
            browser.refresh()
            assert f"8 of {PAIRS}" in body().text
        favourite = "left" if pair["sides"][0] == "jpeg-flops" else "right"
        cast.append("tie" if number % 7 == 3 else favourite if number % 5 else "left")
        if number % 4 == 0:
            browser.find_element(By.ID, cast[-1]).click()
        else:
            body().send_keys(keys[cast[-1]])
    found = json.loads(browser.find_element(By.ID, "json").text)
    assert [vote["choice"] for vote in found["votes"]] == cast
    winners = Counter(
        "tie" if choice == "tie" else pair["sides"][choice == "right"]
        for choice, pair in zip(cast, hidden["pairs"], strict=True)
    )
    assert found["counts"] == [winners[name] for name in (*hidden["models"], "tie")]
    test = binomtest(found["counts"][0], sum(found["counts"][:2]))
    interval = test.proportion_ci(method="wilson")
    np.testing.assert_allclose(found["interval"], [interval.low, interval.high], atol=1e-9)
    assert found["p"] == pytest.approx(test.pvalue, rel=1e-9)
    assert hidden["titles"][1] in body().text and "preferred JPEG" in body().text
    assert not browser.get_log("browser")

    (tmp_path / "a.json").write_text(json.dumps(found))
    (tmp_path / "b.json").write_text(json.dumps(found))
    capsys.readouterr()
    compare.main(["vote", str(out), "--count", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    said = capsys.readouterr().out
    assert f"JPEG: {2 * found['counts'][0]}\n" in said and "2 people" in said
    for spoilt, why in (({"page": "other"}, "another page"), ({"votes": [{"left": "x"}]}, "no result of a vote")):
        (tmp_path / "b.json").write_text(json.dumps(found | spoilt))
        with pytest.raises(UserError, match=why):
            compare.main(["vote", str(out), "--count", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    (tmp_path / "b.json").write_bytes(b" " * (2 << 20))
    with pytest.raises(UserError, match="more than 1 MiB"):
        compare.main(["vote", str(out), "--count", str(tmp_path / "b.json")])


def test_one_who_can_never_tell_gives_no_share(out, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    written(out, "--pairs", "2")
    browser.get((out / "vote.html").as_uri())
    for _ in range(2):
        browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_DOWN)
        time.sleep(0.05)
    found = json.loads(browser.find_element(By.ID, "json").text)
    assert found["counts"] == [0, 0, 2] and "share" not in found
