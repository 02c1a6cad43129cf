"""An explorer in Notebook 7 is drawn; a control moves the kernel's value and its numbers."""

import pytest

from goatviz.explore import explore_prior
from goatviz.training import load_pretrained
from tests.browser.lab import Lab
from tests.browser.numbers import agree, expected

pytestmark = pytest.mark.browser

MAKE = """
from goatviz import explore_prior, load_pretrained
explorer = explore_prior(load_pretrained("copy-mixture-1-goat"))
explorer
"""
#: Errors of Notebook's own, of settings and commands that only JupyterLab has.
ITS_OWN = ("(reading 'schema')", "Command 'filebrowser:open-path' not registered")


def test_a_control_moves_the_kernels_value_and_the_page_shows_its_numbers(
    own_server, offline_context, offline_page
):
    notebook = Lab(own_server, offline_page)
    notebook.open(own_server.write("seven.ipynb", MAKE), place="notebooks")
    notebook.run_all()
    explorer = explore_prior(load_pretrained("copy-mixture-1-goat"))
    shown = offline_page.locator(".goatviz-explorer")
    agree(shown, expected(explorer))
    slider = shown.locator("input[name=sink_scale]")
    for _ in range(10):
        # With the focus each time: Notebook takes it while outputs settle.
        slider.press("ArrowLeft")
    explorer.sink_scale = 0.5
    agree(shown, expected(explorer))
    assert notebook.ask("explorer.values()") == explorer.values()
    assert offline_context.outside_requests == []
    errors = offline_context.console_errors
    assert [each for each in errors if not any(own in each for own in ITS_OWN)] == []
