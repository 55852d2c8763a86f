"""A tour of Dagster's UI in a real browser: `make ui-tour` looks at each page, acts on it, and keeps its screenshot.

It needs Playwright's Python package and a Chromium of the system (`apt-get install chromium`); without them it says so.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from configs.loader import EXPERIMENTS, merge
from tests.pipeline.dev_server import IN_PROCESS, Server, dev, eventually

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync"]
OWNED = {"owners": ["team:reasoning"]}
GROUP = ("base_model", "sft_model", "grpo_checkpoint", "base_held_out", "sft_held_out", "grpo_held_out")
ASSETS = ["dataset/chains", *(f"quickstart/{name}" for name in GROUP), "leaderboard"]
LOCATION = "locations/pipeline.definitions"
GRPO = "quickstart/grpo_checkpoint"
SECONDS = 60
WINDOW: Any = {"width": 1360, "height": 820}
MISSPELL = """element => {
    const editor = element.CodeMirror;
    const lines = editor.getValue().replace("learning_rate:", "learning_rat:");
    editor.setValue(lines);
    const line = lines.split("\\n").findIndex(text => text.includes("learning_rat:"));
    editor.setCursor({line, ch: 0});
    editor.scrollIntoView({line, ch: 0}, 150);
}"""


def main(folder: Path) -> int:
    """Screenshots into `folder`; 0 where every page showed what it should, or where there is no browser."""
    try:
        from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports] (not a dependency)
    except ImportError:
        print("skipped: no Playwright here; pip install playwright")
        return 0
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print("skipped: no Chromium here; apt-get install chromium")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    experiment = merge(yaml.safe_load((EXPERIMENTS / "quickstart.yaml").read_text()), OWNED)
    with (
        tempfile.TemporaryDirectory() as scratch,
        dev(Path(scratch), experiments={"quickstart": experiment}) as server,
        sync_playwright() as playwright,
    ):
        materialise(server)
        chromium = playwright.chromium.launch(executable_path=browser, args=FLAGS)
        tour = Tour(server, chromium.new_page(viewport=WINDOW), folder)
        for visit in (tour.group, tour.asset, tour.report, tour.launchpad, tour.cancel, tour.failed_check):
            visit()
            print(f"seen: {visit.__name__.replace('_', ' ')}", flush=True)
        chromium.close()
    return 0


def materialise(server: Server) -> None:
    """The whole group, then its last report once more: pages compare with the one before."""
    for assets in (ASSETS, ["quickstart/grpo_held_out"]):
        assert server.finish(server.launch("quickstart", assets, IN_PROCESS), 600) == "SUCCESS"


class Tour:
    """One visit a page; each ends with a screenshot of what was waited for."""

    def __init__(self, server: Server, page: Any, folder: Path) -> None:
        self.server, self.page, self.folder = server, page, folder
        page.set_default_timeout(SECONDS * 1000)

    def go(self, path: str) -> None:
        self.page.goto(f"http://127.0.0.1:{self.server.port}/{path}")

    def keep(self, name: str, wait: float = 1.5) -> None:
        self.page.wait_for_timeout(wait * 1000)  # animations; the UI's websockets never let the network rest
        picture = Image.open(io.BytesIO(self.page.screenshot())).convert("RGB")
        picture.quantize(256, kmeans=1).save(self.folder / f"ui_{name}.png", optimize=True)  # a third as large

    def sees(self, text: str) -> Any:
        found = self.page.get_by_text(text).first
        found.wait_for()
        return found

    def group(self) -> None:
        self.page.set_viewport_size({"width": 1900, "height": 1200})  # on fewer pixels the boxes have no details
        self.go(f"{LOCATION}/asset-groups/quickstart/lineage")
        self.page.get_by_text("Hide navigation").click()  # on the next pages too
        self.page.get_by_text("Materialized").nth(len(GROUP) - 1).wait_for()
        self.keep("group", 4)
        self.page.set_viewport_size(WINDOW)

    def asset(self) -> None:
        self.go(f"assets/{GRPO}?view=overview")
        self.sees("curves")
        self.keep("asset")
        self.page.get_by_text("Show Markdown").first.click()
        self.page.locator("img[alt='curves']").wait_for()
        self.keep("asset_curves")

    def report(self) -> None:
        self.go("assets/quickstart/grpo_held_out?view=overview")
        self.sees("change_since_sft")
        self.page.mouse.move(600, 600)
        self.page.mouse.wheel(0, 450)
        self.keep("report")

    def launchpad(self) -> None:
        """The defaults of the file, one of them misspelt."""
        self.go(f"{LOCATION}/jobs/quickstart/playground")
        self.sees("quickstart__grpo_checkpoint")
        self.page.locator(".CodeMirror").first.evaluate(MISSPELL)
        self.sees('unexpected config entry "learning_rat"')
        self.keep("launchpad")

    def cancel(self) -> None:
        settings = {"steps": 100_000, "checkpoint": {"save_every": 100_000}}
        config = {"ops": {"quickstart__grpo_checkpoint": {"config": settings}}}
        run = self.server.launch("quickstart", [GRPO], config)
        eventually(lambda: "grpo 2/100000" in self.server.messages(run) or self._trains(run), 300)
        self.go(f"runs/{run}")
        self.page.get_by_role("button", name="Terminate").first.click()
        self.page.get_by_role("dialog").get_by_role("button", name="Terminate").click()
        assert self.server.finish(run) == "CANCELED"
        self.go(f"runs/{run}")
        self.sees("Canceled")
        self.keep("cancelled", 4)

    def _trains(self, run: str) -> bool:
        folder = self.server.artifacts / "quickstart" / "grpo" / run[:8] / "metrics.jsonl"
        return folder.is_file() and len(folder.read_text().splitlines()) >= 2

    def failed_check(self) -> None:
        (weights,) = self.server.artifacts.glob("quickstart/grpo/*/published/*/model/model.safetensors")
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.unlink()  # the checkpoint it was made from may share its blocks
        weights.write_bytes(data)
        run = self.server.check("quickstart", GRPO, "reloads_finite")
        self.server.finish(run)
        self.go(f"assets/{GRPO}?view=checks")
        self.sees("not what was written")
        self.keep("failed_check", 4)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
