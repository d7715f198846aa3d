"""The report of runs: what stands in the page, and that it needs nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from caduceus.monitor.report import write
from caduceus.monitor.report.bins import BINS
from caduceus.monitor.report.figures import CURVES, draw_curves, draw_events, to_svg
from caduceus.monitor.report.reported import differences, read_run
from caduceus.monitor.report.tracks import title_of
from caduceus.monitor.report.write import report_of_finished, write_report
from caduceus.monitor.windows import windows_of
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import record_end
from caduceus.train.trainer import train
from tests.monitor.conftest import STEPS, Watched
from tests.train.conftest import SmallRun

REPOSITORY = Path(__file__).resolve().parents[3]
PNGS = ["events", "grad_norm", "loss", "lr", "memory", "perplexity", "throughput"]
DETAILS = ["accuracy", "epochs", "gradients", "regions", "strands", "updates"]
DETAILS += ["network", "node_memory", "processors"]
BY_LAYER = ["reach", "scales", "steps"]


class Page(HTMLParser):
    """A page's tables as rows of cells, its ids, what its SVGs say, and every address that it names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self._in_cell = False
        self.feed(self.text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.labels += [values["aria-label"]] if tag == "svg" else []
        self.addresses += [values[name] for name in ("src", "href", "xlink:href", "srcset", "data") if name in values]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell &= tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data

    def table(self, *first: str) -> list[list[str]]:
        """The rows of the first table whose headings begin like this, without the headings."""
        return next(rows[1:] for rows in self.tables if tuple(rows[0][: len(first)]) == first)


def line_of(text: str, figure: str, gid: str) -> np.ndarray:
    """The points (n, 2) of a drawn line, in the picture's own units."""
    path = re.search(rf'<g id="{figure}-{gid}">\s*<path d="([^"]*)"', text)[1]
    return np.array([[float(number) for number in point.split()] for point in re.findall(r"[ML] ([-\d. ]+)", path)])


def assert_drawn(points: np.ndarray, x: list[float], y: list[float], scales: list | None = None) -> list[np.ndarray]:
    """The points are the values, up to the scale of each axis, which is returned; matplotlib writes six decimals."""
    assert len(points) == len(x)
    scales = scales or [scale_of(values, drawn) for values, drawn in zip((x, y), points.T, strict=True)]
    for values, drawn, scale in zip((x, y), points.T, scales, strict=True):
        assert drawn == pytest.approx(np.polyval(scale, values), abs=1e-4)
    return scales


def scale_of(values: list[float], drawn: np.ndarray) -> np.ndarray:
    """Slope and offset from the least and greatest value."""
    low, high = np.argmin(values), np.argmax(values)
    slope = (drawn[high] - drawn[low]) / (values[high] - values[low])
    return np.array([slope, drawn[low] - slope * values[low]])


def assert_self_contained(page: Page) -> None:
    assert all(address.startswith("#") and address[1:] in page.ids for address in page.addresses)
    assert "http" not in page.text and "@import" not in page.text and "src=" not in page.text
    assert all(name in page.ids for name in re.findall(r"url\(#?([^)]*)\)", page.text))
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image"}
    assert len(set(page.ids)) == len(page.ids)


@pytest.mark.slow
def test_two_real_runs(small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = {"report": True, "every": 2, "windows": 1, "machine_seconds": 1e-3}
    first = small_run.config("first", train={"steps": 6}, monitor=monitor)
    keys = {"train": {"steps": 4, "lr": 0.004}, "checkpoint": {"every": 2}, "monitor": {"windows": 1}}
    second = small_run.config("second", **keys)
    assert train(first) == 0 and train(second) == 0
    assert not (tmp_path / "second" / "report").exists()  # tests leave it out where it is not their matter
    made_at_the_end = Page(tmp_path / "first" / "report" / "report.html")
    assert_self_contained(made_at_the_end)
    names = sorted(path.stem for path in (tmp_path / "first" / "report").glob("*.png"))
    assert names == [f"report-{name}" for name in sorted(PNGS + DETAILS + BY_LAYER)]
    assert matplotlib.image.imread(tmp_path / "first" / "report" / "report-loss.png").std() > 0.01

    target = tmp_path / "deep" / "both.html"
    command = [sys.executable, "-m", "caduceus.monitor", str(tmp_path / "first"), str(tmp_path / "second")]
    subprocess.run([*command, "--report", str(target)], check=True, cwd=REPOSITORY)
    page = Page(target)
    assert_self_contained(page)
    assert [row[:4] for row in page.table("run", "state")] == [
        ["first", "finished", "6", "6"],
        ["second", "finished", "4", "4"],
    ]
    for number, name in enumerate(("first", "second")):
        rows = RunDirectory.open(tmp_path / name).metrics()
        steps = [row for row in rows if "loss" in row]
        validations = [row for row in rows if "valid_loss" in row]
        for axis in ("tokens", "step"):
            x = [row["tokens"] if axis == "tokens" else row["step"] for row in steps]
            at = dict(zip((row["step"] for row in steps), x, strict=True))
            drawn = line_of(page.text, f"loss-{axis}", f"train-{number}")
            scales = assert_drawn(drawn, x, [row["loss"] for row in steps])
            drawn = line_of(page.text, f"loss-{axis}", f"valid-{number}")
            where, values = [at[row["step"]] for row in validations], [row["valid_loss"] for row in validations]
            assert_drawn(drawn, where, values, scales)
        lr = line_of(page.text, "lr-hours", f"train-{number}")
        assert_drawn(lr, np.cumsum([row["seconds"] for row in steps]).tolist(), [row["lr"] for row in steps])
        numbers = [rows[1:] for rows in page.tables if rows[0][:3] == ["step", "hours", "tokens"]][number]
        assert [[row[0], row[2], row[3], row[5]] for row in numbers] == [
            [str(row["step"]), f"{row['tokens']:.6g}", f"{row['loss']:.6g}", f"{row['grad_norm']:.6g}"] for row in steps
        ]
    assert page.table("key", "first") == [
        ["checkpoint.every", "3", "2"],
        ["monitor.every", "2", "100"],
        ["monitor.machine_seconds", "0.001", "0.0"],
        ["monitor.report", "true", "false"],
        ["run.dir", str(tmp_path / "first"), str(tmp_path / "second")],
        ["run.name", "first", "second"],
        ["train.lr", "0.008", "0.004"],
        ["train.steps", "6", "4"],
    ]
    assert [label for label in page.labels if label.startswith("Loss of the training steps. first: ")]
    windows = [
        window for name in ("first", "second") for window in windows_of(tmp_path / name, {"first": 6}.get(name, 4))
    ]
    assert [label for label in page.labels if " window: " in label] == [title_of(window) for window in windows]
    assert len(windows) == 4 and len(page.labels) == 3 * len(PNGS + DETAILS) + len(BY_LAYER) + len(windows)
    for number, name in enumerate(("first", "second")):
        last = [row for row in RunDirectory.open(tmp_path / name).metrics() if "valid_loss" in row][-1]
        shown = page.table("run", "species")[number]
        expected = [last[f"valid_{key}"] for key in ("loss", "loss_nonrepeat", "loss_repeat", "accuracy")]
        assert shown[:7] == [name, "small", str(last["step"]), *(f"{value:.4f}" for value in expected)]
        confusion = [rows[1:] for rows in page.tables if rows[0][0] == "true base"][number]
        assert confusion[0] == ["A", *(f"{last[f'valid_confusion/A{taken}']:.1%}" for taken in "ACGT")]
    drawn = line_of(page.text, "gradients-step", "line-0-0")
    rows = [row for row in RunDirectory.open(tmp_path / "first").metrics() if "grad_norm/embedding" in row]
    assert_drawn(drawn, [2, 4, 6], [np.log(row["grad_norm/embedding"]) for row in rows])


@pytest.mark.moderate
def test_differences_are_exact(tmp_path: Path) -> None:
    paths = []
    for name, mode in (("a", "disabled"), ("b", "offline")):
        watched = Watched(tmp_path / name / "run", mode="disabled")
        watched.go_on(1, 5)
        watched.config.wandb.mode = mode
        watched.run.keep_config(watched.config)
        paths.append(watched.path)
    (paths[1] / "resolved.yaml").write_text("ops:\n  backend: {asked: auto, takes: naive, because: it is}\n")
    assert differences([read_run(path) for path in paths]) == [
        ("ops.backend", ["auto", "auto → naive"]),
        ("run.dir", [str(path) for path in paths]),
        ("wandb.mode", ["disabled", "offline"]),
    ]


@pytest.mark.moderate
def test_events_stand_on_the_axis_and_in_the_table(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "run", mode="disabled")
    watched.run.write_provenance({"step": 0, "ranks": 2})
    watched.go_on(1, 20, stopped=True)
    watched.run.write_provenance({"step": 20, "ranks": 2})
    watched.go_on(21, 30, shift=64)
    record_end(tmp_path / "run" / "logs" / "ends" / "77-0", 1, RuntimeError("the card <fell> off"))
    for step in (10, 30):
        watched.run.checkpoint_path(step).mkdir(parents=True)
        (watched.run.checkpoint_path(step) / "COMPLETE").write_text("{}")
    run = read_run(watched.path)
    assert [(event.kind, event.step) for event in run.events] == [
        *[("start", 0), ("start", 20), ("rewind", 20), ("checkpoint", 10), ("checkpoint", 30), ("end", None)]
    ]
    assert "the card <fell> off" in run.events[-1].words and "64 samples" in run.events[2].words
    svg = to_svg(draw_events([run], "step"), "events", "")
    for kind, count in (("start", 2), ("rewind", 1), ("checkpoint", 2)):
        marks = re.search(rf'<g id="events-{kind}-0">.*?</g>\s*</g>', svg, re.DOTALL)[0]
        assert len(re.findall("<use ", marks)) == count


@pytest.mark.moderate
def test_state_of_a_run_that_failed_or_was_left(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "run", mode="disabled")
    watched.go_on(1, 10, stopped=True)
    watched.run.release()
    assert read_run(watched.path).state == "in training"  # a row was made a moment ago, perhaps on another host
    os.utime(watched.run.metrics_path, (0, 0))
    assert read_run(watched.path).state == f"stopped at step 10 of {STEPS}"
    record_end(watched.path / "logs" / "ends" / "1-0", 0, RuntimeError("out of luck"))
    assert "out of luck" in read_run(watched.path).state
    watched.go_on(11, STEPS)
    assert read_run(watched.path).state == "finished"


@pytest.mark.moderate
def test_long_runs_are_drawn_by_bins(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "run", mode="disabled")
    rows = [
        {"step": n, "samples": 8 * n, "tokens": n, "loss": float(n), "seconds": 1.0} for n in range(1, 10 * BINS + 1)
    ]
    watched.run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    points = line_of(to_svg(draw_curves(CURVES[0], [read_run(watched.path)], "step"), "loss", ""), "loss", "train-0")
    middles = [16 * place + 8.5 for place in range(10 * BINS // 16)]  # means of 1 … 16, 17 … 32, …
    assert_drawn(points, middles, middles)


@pytest.mark.moderate
@pytest.mark.parametrize(
    "damage", ["no folder", "foreign", "no rows", "empty rows", "damaged rows", "config", "config type"]
)
def test_what_is_no_run_with_rows_is_one_line(watched: Watched, tmp_path: Path, damage: str) -> None:
    watched.config.wandb.mode = "disabled"
    path, metrics = watched.path, watched.run.metrics_path
    if damage == "no folder":
        shutil.rmtree(path)
    elif damage == "foreign":
        watched.run.config_path.unlink()
    elif damage in ("empty rows", "damaged rows"):
        metrics.write_text("" if damage == "empty rows" else "\x00\x00\n[]\n")
    elif damage.startswith("config"):
        metrics.write_text('{"step": 1, "loss": 1.0}\n')
        watched.run.config_path.write_bytes(b"\xff\x00: [" if damage == "config" else b"- 1\n- 2\n")
    target = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, "-m", "caduceus.monitor", str(path), "--report", str(target)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(path) in done.stderr, done.stderr
    assert not target.exists() and not list(tmp_path.glob("*.png"))


@pytest.mark.moderate
def test_a_report_that_cannot_be_made_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path / "run", mode="disabled")
    watched.go_on(1, 5)
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "matplotlib.py").write_text("raise ImportError('no matplotlib here')\n")
    with monkeypatch.context() as without:
        without.setenv("PYTHONPATH", str(tmp_path / "absent"))
        caplog.clear()
        assert report_of_finished(watched.path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "pip install matplotlib" in caplog.text and f"caduceus.monitor {watched.path} --report" in caplog.text
    assert not (watched.path / "report" / "report.html").exists()
    monkeypatch.setattr(write, "REPORT_SECONDS", 0.05)
    caplog.clear()
    assert report_of_finished(watched.path) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "within" in caplog.text


@pytest.mark.slow
def test_in_a_browser_nothing_is_wider_than_the_window_and_no_request_leaves_the_page(tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or google-chrome on this machine")
    watched = Watched(tmp_path / ("a-run-of-a-long-name-" * 4), mode="disabled")
    watched.go_on(1, STEPS)
    write_report([watched.path], tmp_path / "report.html")
    # A page in a frame of the width asked for, as headless windows have a least width.
    probe = (
        "<script>onload = () => { const frame = document.querySelector('iframe');"
        "const inner = frame.contentDocument.documentElement;"
        "const asked = frame.contentWindow.performance.getEntriesByType('resource');"
        "const text = inner.querySelector('.on-tokens svg text');"
        "document.title = [inner.scrollWidth, inner.clientWidth, getComputedStyle(text).fontSize,"
        "inner.querySelector('.on-tokens svg').getBoundingClientRect().width, asked.length].join(' ') }</script>"
    )
    for width in (400, 1400):
        frame = f'<iframe src="report.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
        (tmp_path / "probe.html").write_text(f"<!doctype html><title>none</title>{probe}{frame}")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        address = (tmp_path / "probe.html").as_uri()
        done = subprocess.run([browser, *options, profile, address], capture_output=True, text=True, timeout=120)
        measured = re.search("<title>(.*?)</title>", done.stdout)[1].split()
        scroll, client, font, drawn = int(measured[0]), int(measured[1]), float(measured[2][:-2]), float(measured[3])
        assert measured[4] == "0"  # requests of the page, those that failed among them
        assert scroll == client and width - 20 <= client <= width  # less a scroll bar
        assert drawn >= 360  # inches of the figure to points: letters keep at least 360/360 of their size
        assert font >= 8
