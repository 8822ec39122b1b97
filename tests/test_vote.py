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
from studies import compare, vote
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
            pixels = rng.integers(0, 256, (size, size, 3), np.uint8)
            if "jpeg" in name:
                Image.fromarray(pixels).save(folder / name / f"{number:05d}.jpg")
            else:
                save_pixels(folder / name / f"{number:05d}", pixels)
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


def written(out: Path, *flags: str) -> tuple[bytes, dict]:
    """The page, and what it hides."""
    compare.main(["vote", str(out), *flags])
    data = (out / "vote.html").read_bytes()
    (hidden,) = re.findall(rb'atob\("([^"]+)"\)', data)
    return data, json.loads(base64.b64decode(hidden))


def completion(out: Path, model: str, number: int) -> Path:
    return next((out / "samples" / model / "whole-0" / "keep_0.5").glob(f"{number:05d}.*"))


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
            file = completion(out, name, pair["picture"])
            assert (pixels_of(pair[side]) == opened(file, SIZE)).all()  # of one size, whatever the model's
        whole = opened(out / "test/whole" / f"{pair['picture']:05d}.png", SIZE)
        assert np.array_equal(pixels_of(pair["given"]), whole[: SIZE // 2])


def test_a_study_that_is_half_done_is_compared_as_far_as_both_models_got(out):
    for name, missing in (("jpeg-flops", (0, 3)), ("vq8-flops", (5, 13))):
        for number in missing:
            completion(out, name, number).unlink()
    _, hidden = written(out)
    assert sorted(pair["picture"] for pair in hidden["pairs"]) == sorted({*range(PAIRS)} - {0, 3, 5, 13})
    for pair in hidden["pairs"]:
        file = completion(out, pair["sides"][0], pair["picture"])
        assert (pixels_of(pair["left"]) == opened(file, SIZE)).all()


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
        ([" --keep 0.25"], "0 models that completed --keep 0.25, and 2 are needed: choose of 0.5, or"),
        ([" --pairs 1"], "--pairs 1 of 14 completions: choose 2 or more"),
        ([" --seed -1"], "--seed is -1"),
        ([" --count nothing.json"], "nothing.json is no result of a vote .* leave it out"),
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
    first, second, _ = found["counts"]
    assert all(title in body().text for title in hidden["titles"])
    preferred = f"preferred {hidden['titles'][first < second]} in {round(100 * max(first, second) / (first + second))}%"
    assert f"You {preferred} of {first + second} decided pairs" in body().text
    body().send_keys(Keys.BACKSPACE, Keys.ARROW_LEFT)  # what was counted is changed by its button alone
    assert json.loads(browser.find_element(By.ID, "json").text) == found
    assert not browser.get_log("browser")

    (tmp_path / "a.json").write_text(json.dumps(found))
    capsys.readouterr()
    compare.main(["vote", str(out), "--count", str(tmp_path / "a.json")])
    said = capsys.readouterr().out
    assert f"| JPEG | {first} |" in said and f"one person {preferred} of {first + second} decided pairs" in said
    total = vote.counted(out, [tmp_path / "a.json"])
    assert all(total[key] == found[key] for key in ("titles", "counts", "share"))
    assert [*total["interval"], total["p"]] == pytest.approx([*found["interval"], found["p"]], abs=1e-9)


def saved(out: Path, path: Path, *wins: str, **more: object) -> str:
    """A file as the page saves it, of one who chose those models."""
    data, hidden = written(out)
    (page,) = re.findall(rb'page = "(\w+)"', data)
    votes = [
        {
            "picture": pair["picture"],
            "left": left,
            "right": right,
            "choice": {left: "left", right: "right"}.get(win, "tie"),
        }
        for win, pair in zip(wins, hidden["pairs"], strict=False)
        for left, right in [pair["sides"]]
    ]
    path.write_text(json.dumps({"page": page.decode(), "models": hidden["models"], "votes": votes} | more))
    return str(path)


def test_votes_of_several_people_are_added_up(out, tmp_path, capsys):
    one = saved(out, tmp_path / "one.json", *["vq8-flops"] * 9, "tie")
    two = saved(out, tmp_path / "two.json", *["vq8-flops"] * 4, "jpeg-flops", "tie", "tie")
    capsys.readouterr()
    compare.main(["vote", str(out), "--count", one, two])
    said = capsys.readouterr().out
    test = binomtest(13, 14)
    low, high = test.proportion_ci(method="wilson")
    verdict = f"in 93% of 14 decided pairs (95%: {100 * low:.0f} to {high:.0%}, p {test.pvalue:.2g})\n"
    assert said.endswith(f"2 people preferred VQ, 8x8 pixels a code, as many FLOPs as JPEG {verdict}")
    assert "| JPEG | 1 | 7%" in said and "| cannot tell | 3 |" in said
    compare.main(["vote", str(out), "--count", saved(out, tmp_path / "one.json", *["vq8-flops"] * 5, "jpeg-flops")])
    assert capsys.readouterr().out.endswith(": no difference can be said\n")
    compare.main(["vote", str(out), "--count", saved(out, tmp_path / "one.json", "tie")])
    assert "nobody could ever tell" in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoilt",
    [b"", b"[]", b"[" * 100_000, b" " * (2 << 20), {"votes": []}, {"votes": 3}, {"votes": [{"left": "jpeg-flops"}]}]
    + [{"votes": [{"left": "jpeg-flops", "right": "vq8-flops", "choice": choice}]} for choice in ("both", [], None)]
    + [{"votes": [{"left": "jpeg-flops", "right": "jpeg-flops", "choice": "left"}]}]
    + [{"models": each} for each in ([], "ab", ["jpeg-flops"] * 2, ["jpeg-flops", "gif-flops"], [1, 2], 7)],
)
def test_a_file_that_is_no_result_is_refused_by_name(spoilt, out, tmp_path):
    path = tmp_path / "spoilt.json"
    saved(out, path, "tie", **(spoilt if isinstance(spoilt, dict) else {}))
    if isinstance(spoilt, bytes):
        path.write_bytes(spoilt)
    with pytest.raises(UserError, match="spoilt.json is no result of a vote"):
        compare.main(["vote", str(out), "--count", str(path)])


def test_results_of_different_pages_are_not_added_up(out, tmp_path):
    one, other = saved(out, tmp_path / "one.json", "tie"), saved(out, tmp_path / "other.json", "tie", page="0" * 16)
    with pytest.raises(UserError, match=r"other.json is of another page than .*vote.html"):
        compare.main(["vote", str(out), "--count", one, other])
    (out / "vote.html").unlink()
    with pytest.raises(UserError, match=r"other.json is of another page than .*one.json"):
        compare.main(["vote", str(out), "--count", one, other])


def test_intervals_and_p_of_the_page_are_those_of_scipy(out, browser):
    written(out)
    browser.get((out / "vote.html").as_uri())
    cases = [(k, n) for n in (1, 2, 3, 10, 50, 333, 2000) for k in range(0, n + 1, 1 + n // 40)]
    found = browser.execute_script("return arguments[0].map(([k, n]) => [...wilson(k, n), binomial(k, n)])", cases)
    tests = [binomtest(*case) for case in cases]
    wanted = [[*test.proportion_ci(method="wilson"), test.pvalue] for test in tests]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_where_nothing_can_be_kept_votes_are_taken_all_the_same(out, browser):
    """A page without an origin is denied its storage, as some browsers deny files."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    data, _ = written(out, "--pairs", "2")
    browser.get(f"data:text/html;base64,{base64.b64encode(data).decode()}")
    denied = "try { localStorage; return false } catch { return true }"
    assert browser.execute_script(denied)
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_LEFT)
    assert "2 of 2" in browser.find_element(By.TAG_NAME, "body").text


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
