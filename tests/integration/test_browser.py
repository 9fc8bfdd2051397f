"""The pages in a real browser, on a live daemon: a fold is shown without loading anew, keys reach everything, no other
host is asked, nothing goes wrong. `tests/campaigns/pages.py` has the whole of it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from continual import making
from tests.helpers import models
from tests.helpers.browsing import CHROMIUM, MISSING, browser, walked
from tests.helpers.services import daemon, status, until, url

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=MISSING)]


def test_an_open_page_shows_a_fold_and_is_walked_by_keys(tmp_path: Path) -> None:
    base, state, watch = models.base(tmp_path / "base"), tmp_path / "state", tmp_path / "in"
    making.init(base, state)
    models.fine_tune(base, watch / "<b>alice", 1)
    with daemon(state, watch) as process, browser() as page:
        address = url(process, state)
        until(lambda: status(address)["folds"] == 1, "the first fold")
        page.looks(width=360)
        page.open(address)
        page.say("window.mark = 'the same document'")
        assert "<b>alice" in page.say("document.querySelector('[data-live=folds]').innerText")
        models.fine_tune(base, watch / "bob", 2)
        page.until("document.querySelector('[data-live=folds]').innerText.includes('bob')", "the fold is shown")
        assert page.say("window.mark") == "the same document"
        assert page.say("document.documentElement.scrollWidth") <= 360
        walked(page)
        page.say("document.querySelector('[data-live=folds] td a').focus()")
        page.press("Enter")
        page.until("location.pathname === '/folds/2' && document.readyState === 'complete'")
        page.until("document.querySelectorAll('button.copy').length > 3", "commands can be copied")
        walked(page)
        assert page.console == []
        assert {urlsplit(asked).netloc for asked in page.asked} == {urlsplit(address).netloc}
